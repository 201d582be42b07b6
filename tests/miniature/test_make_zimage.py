import json
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import ZImagePipeline
from safetensors.torch import load_file

from benchmarks.miniature import make_zimage, making, teacher, tower, world
from benchmarks.miniature.files import REPOSITORY, ZIMAGE_MODEL, check_settings
from benchmarks.miniature.making import using_transformer
from benchmarks.miniature.tasks import Task, standard_tasks
from benchmarks.miniature.zimage import VLM_FOLDER, ZIMAGE
from benchmarks.miniature.zimage_parts import NUM_VISUAL_TOKENS
from command_line import Command, succeed, weights
from dopsd.errors import InputError
from pipelines.vision_encoder import WEIGHTS_FILE
from short_runs import as_arguments


def two_tasks(count: int) -> dict[str, Task]:
    """One with a text only, one with a picture."""
    return {name: task for name, task in standard_tasks(count).items() if name in ("text_seen", "reference_unseen")}


@pytest.fixture
def make(tmp_path, monkeypatch, reader):
    """Makes a miniature of a tiny world in a few updates: (its flags) -> lines of the log so far."""
    some = [item for item in world.known_appearances() if item.shape == "disc" and item.colours == ("red",)]
    monkeypatch.setattr(world, "known_appearances", lambda: some)
    monkeypatch.setattr(teacher, "NUM_GRAIN_PICTURES", 64)
    monkeypatch.setattr(tower, "BATCH_SIZE", 2)
    monkeypatch.setattr(making, "PictureReader", lambda appearances: reader)
    monkeypatch.setattr(making, "standard_tasks", two_tasks)
    few = dict.fromkeys(("text_rows", "word_rows", "reference_rows"), 1) | {"num_objects": 5, "eval_count": 2}
    fixed = {"work_dir": tmp_path / "work", "output_dir": tmp_path / "model", **few}

    def run(**flags) -> list[dict]:
        monkeypatch.setattr(sys, "argv", ["make_zimage.py", *as_arguments(fixed | flags)])
        make_zimage.main()
        return [json.loads(line) for line in (tmp_path / "work" / "log.jsonl").read_text().splitlines()]

    return run


def test_it_makes_a_pipeline_and_a_qwen3_vl_and_goes_on_where_it_stopped(make, tmp_path, monkeypatch):
    model, work = tmp_path / "model", tmp_path / "work"
    flags = {"tower_steps": 2, "num_steps": 2}

    def stop(*args, **settings) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as stopped:
        stopped.setattr(making, "distill", stop)
        with pytest.raises(KeyboardInterrupt):
            make(**flags)
    vlm = load_file(model / VLM_FOLDER / WEIGHTS_FILE)
    lines = make(**flags)
    assert [line["tower_step"] for line in lines if "tower_step" in line] == [2, 2]  # seen and unseen, not repeated
    last = lines[-1]
    assert last["step"] == 2 and all("exact" in last[name] for name in two_tasks(1))
    assert (work / "sheet.png").exists()
    assert np.load(work / "sprites.npy").shape[0] == len(world.known_appearances()) + 5
    assert len(make(**flags)) == len(lines) + 1  # complete: measures again and trains no more

    # What is written is what was trained: with the average of the transformer's weights.
    averaged = torch.load(work / "distill.pt", weights_only=True)["averaged"]
    assert_same(ZImagePipeline.from_pretrained(model).transformer.state_dict(), averaged)
    trained = torch.load(work / "tower.pt", weights_only=True)["training"]
    tower_weights = {name: weight for name, weight in trained.items() if name.startswith("tower.")}
    visual = {name.replace("tower.", "model.visual."): weight for name, weight in tower_weights.items()}
    for written in (vlm, load_file(model / VLM_FOLDER / WEIGHTS_FILE)):
        assert_same({name: weight for name, weight in written.items() if ".visual." in name}, visual)
    assert ZIMAGE.load(model).vision_encoder.num_image_tokens(world.SIDE, world.SIDE) == NUM_VISUAL_TOKENS


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_a_run_with_another_seed_needs_another_folder(make, tmp_path):
    (tmp_path / "work").mkdir()
    fixed = {"seed": 0, "tower_steps": 2, "num_steps": 2, "muon_lr": 1.2e-2, "adamw_lr": 2e-3}
    check_settings(tmp_path / "work", fixed, flag="--work_dir")
    with pytest.raises(InputError, match="^--work_dir .* another seed \\(0, now 1\\); choose a new folder$") as raised:
        make(tower_steps=2, num_steps=2, seed=1)
    assert "\n" not in str(raised.value)


def test_the_pipeline_keeps_its_transformer_when_an_evaluation_fails(miniature):
    original = miniature.transformer
    with pytest.raises(ZeroDivisionError), using_transformer(miniature, other := torch.nn.Identity()):
        assert miniature.transformer is other
        raise ZeroDivisionError
    assert miniature.transformer is original


def page_code(language: str, folder: Path) -> list[str]:
    """The code blocks of zimage.md, with this folder for the shipped miniature's."""
    text = (ZIMAGE_MODEL.parent / "zimage.md").read_text(encoding="utf-8")
    blocks = [block.split("```")[0] for block in text.split(f"```{language}\n")[1:]]
    return [block.replace(str(ZIMAGE_MODEL.relative_to(REPOSITORY)), str(folder)) for block in blocks]


def test_the_pages_example_draws(zimage_folder):
    names = {}
    exec(page_code("python", zimage_folder)[0], names)
    assert names["elsewhere"].size == names["image"].size == (world.SIDE, world.SIDE)


@pytest.mark.slow
def test_the_pages_training_runs(zimage_folder, forkserver, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(page_code("python", zimage_folder)[1], {})
    command = next(block for block in page_code("bash", zimage_folder) if ZIMAGE.script.name in block)
    launch, flags = command.replace("\\\n", " ").split(ZIMAGE.script.name)
    assert launch == "accelerate launch --cpu "
    for name, value in ZIMAGE.script_flags(zimage_folder).items():
        assert f"--{name} {value} " in flags or name == "max_sequence_length"  # more by default
    # The weights are not trained.
    short = ["--max_train_steps", "1", "--rank", "4", "--ignore_exam", "--validation_steps", "0"]
    succeed(Command(forkserver, ZIMAGE.script)(*shlex.split(flags), *short))
    lora = weights(tmp_path / "zofu-lora")
    assert any(tensor.abs().max() > 0 for name, tensor in lora.items() if "lora_B" in name)
