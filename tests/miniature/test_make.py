import json
import sys

import numpy as np
import pytest
from PIL import Image

from benchmarks.miniature import make, making, world
from benchmarks.miniature.files import check_settings, replacing
from benchmarks.miniature.tasks import standard_tasks
from dopsd.errors import InputError


def test_the_miniature_is_not_made_from_another_ones_parts(tmp_path, monkeypatch):
    (tmp_path / "work").mkdir()
    check_settings(tmp_path / "work", {"seed": 0}, flag="--work_dir")
    flags = ["--work_dir", str(tmp_path / "work"), "--output_dir", str(tmp_path / "model"), "--seed", "1"]
    monkeypatch.setattr(sys, "argv", ["make.py", *flags])
    monkeypatch.setattr(make, "load_or_draw_sprites", lambda *args, **settings: pytest.fail("it starts"))
    with pytest.raises(InputError, match="--work_dir .* another seed \\(0, now 1\\)"):
        make.main()


def test_sprites_are_drawn_once_and_those_with_a_name_come_first(tmp_path):
    appearances = world.known_appearances()[:2]
    sprites = making.load_or_draw_sprites(tmp_path / "sprites.npy", appearances, 3, seed=0)
    assert sprites.shape == (5, 40, 40, 4)
    assert np.array_equal(sprites[1], world.sprite(appearances[1]))
    again = making.load_or_draw_sprites(tmp_path / "sprites.npy", appearances, 3, seed=1)
    assert np.array_equal(again, sprites)


def test_the_sheet_has_a_row_per_task_and_one_for_its_references(tmp_path):
    tasks = standard_tasks(3)
    making.draw_sheet(tasks, {name: task.real for name, task in tasks.items()}, tmp_path / "sheet.png", columns=2)
    assert Image.open(tmp_path / "sheet.png").size == (2 * 2 * 66, 2 * 6 * 66)


def test_the_log_has_one_object_per_line(tmp_path, capsys):
    log = making.Log(tmp_path / "log.jsonl")
    log({"step": 1})
    log({"step": 2})
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"seconds": 0, "step": 1}, {"seconds": 0, "step": 2}]
    assert capsys.readouterr().out.splitlines() == lines


def test_an_interrupted_file_keeps_its_previous_content(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("before")
    with pytest.raises(KeyboardInterrupt), replacing(path) as partial:
        partial.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "before"
    with replacing(path) as partial:
        partial.write_text("after")
    assert path.read_text() == "after" and [*tmp_path.iterdir()] == [path]
