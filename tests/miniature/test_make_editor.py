import json
import sys

import numpy as np
import pytest
from safetensors.torch import load_file

from benchmarks.miniature import make_editor, teacher, world
from benchmarks.miniature.editor import WEIGHTS
from benchmarks.miniature.files import check_settings
from benchmarks.miniature.tasks import standard_tasks
from dopsd.errors import InputError


def set_command_line(monkeypatch, *arguments) -> None:
    monkeypatch.setattr(sys, "argv", ["make_editor.py", *map(str, arguments)])


def test_a_run_with_other_settings_needs_another_folder(tmp_path, monkeypatch):
    check_settings(tmp_path, {"seed": 0}, flag="--work_dir")
    set_command_line(monkeypatch, "--work_dir", tmp_path, "--seed", 1)
    with pytest.raises(InputError, match="--work_dir .* another seed \\(0, now 1\\)"):
        make_editor.main()


def test_it_goes_on_from_the_shipped_miniature(tmp_path, monkeypatch, reader):
    """A tiny world: two updates hardly change what the miniature draws."""
    some = [item for item in world.known_appearances() if item.shape == "disc" and "red" in item.colours]
    monkeypatch.setattr(world, "known_appearances", lambda: some)
    monkeypatch.setattr(teacher, "NUM_GRAIN_PICTURES", 64)
    monkeypatch.setattr(make_editor, "PictureReader", lambda appearances: reader)
    monkeypatch.setattr(make_editor, "NUM_OBJECTS", 4)
    monkeypatch.setattr(make_editor, "NUM_NAMELESS_EDITS", 8)
    monkeypatch.setattr(make_editor, "ROWS_PER_SLOT", {kind: 1 for kind in make_editor.ROWS_PER_SLOT})
    monkeypatch.setattr(make_editor, "editor_tasks", lambda count: {"text_seen": standard_tasks(count)["text_seen"]})
    set_command_line(monkeypatch, "--work_dir", tmp_path, "--num_steps", 2, "--eval_count", 4)
    make_editor.main()
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 2 and lines[-1]["text_seen"]["exact"] == 1
    weights, shipped = load_file(tmp_path / "transformer.safetensors"), load_file(WEIGHTS)
    assert {name: tensor.shape for name, tensor in weights.items()} == {name: t.shape for name, t in shipped.items()}
    assert np.load(tmp_path / "sprites.npy").shape[0] == len(some) + 4
    make_editor.main()  # complete: measures again and trains no more
    again = load_file(tmp_path / "transformer.safetensors")
    assert all(again[name].equal(tensor) for name, tensor in weights.items())
