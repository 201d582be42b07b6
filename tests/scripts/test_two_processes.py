"""Runs of two processes on a CPU, as torchrun and accelerate start them."""

import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from command_line import LORA_FILE, assert_close_weights, succeed
from dopsd.context_cache import ContextCache
from dopsd.history import read_history
from dopsd.output import checkpoint_step, list_checkpoints
from models import NEEDS_COMPILER, ONE_MODEL, SLOW, both_models
from waiting import wait_until


pytestmark = SLOW


@pytest.mark.exhaustive  # the runs with prior preservation and of an editor find what this one would
@both_models(quick="flux2")
def test_two_processes_give_the_lora_of_one_with_twice_the_accumulation(torchrun, command, arguments, tmp_path):
    flags = {"learning_rate": 1e-3, "max_train_steps": 3, "lora_dropout": 0.1}
    process, log = torchrun(arguments("two", **flags, gradient_accumulation_steps=2))
    succeed(command(*arguments("one", **flags, gradient_accumulation_steps=4)))
    assert process.wait(timeout=240) == 0, log.read_text()
    assert_close_weights(tmp_path / "one", tmp_path / "two", atol=1e-5, rtol=1e-3)
    one, two = ([line["loss"] for line in read_history(tmp_path / name)] for name in ("one", "two"))
    assert one == pytest.approx(two, rel=1e-4)


@pytest.mark.exhaustive
@ONE_MODEL
def test_two_processes_share_an_int8_base(torchrun, command, arguments, tmp_path):
    flags = {"learning_rate": 1e-3, "max_train_steps": 2, "quantize": "int8", "quantize_text_encoder": "int8"}
    process, log = torchrun(arguments("two", **flags))
    succeed(command(*arguments("one", **flags, gradient_accumulation_steps=2)))
    assert process.wait(timeout=240) == 0, log.read_text()
    assert_close_weights(tmp_path / "one", tmp_path / "two", atol=1e-5, rtol=1e-3)


@ONE_MODEL
def test_two_processes_share_prior_preservation_and_sampled_states(torchrun, command, arguments, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a house\na tree\na car\n", encoding="utf-8")
    flags = {"learning_rate": 1e-3, "max_train_steps": 3, "num_trained_states": 1, "prior_prompts": prompts}
    flags |= {"with_prior_preservation": True, "trigger_word": "ball", "prior_every": 2, "lora_dropout": 0.1}
    process, log = torchrun(arguments("two", **flags, gradient_accumulation_steps=2))
    succeed(command(*arguments("one", **flags, gradient_accumulation_steps=4)))
    assert process.wait(timeout=240) == 0, log.read_text()
    assert_close_weights(tmp_path / "one", tmp_path / "two", atol=1e-5, rtol=1e-3)
    for name in ("loss", "prior_loss"):
        one, two = (
            {line["step"]: line[name] for line in read_history(tmp_path / folder) if name in line}
            for folder in ("one", "two")
        )
        assert one == pytest.approx(two, rel=1e-3, abs=1e-9) and len(one) == (3 if name == "loss" else 2)


@pytest.mark.exhaustive
@ONE_MODEL
def test_two_processes_draw_the_sheets_of_one(torchrun, command, arguments, tmp_path):
    flags = {"validation_steps": 2, "num_validation_images": 2, "validation_prompt": ["a ball"]}
    # So small that the weights, and with them the images, are the base's.
    flags |= {"learning_rate": 1e-12, "context_cache_dir": tmp_path / "cache"}
    process, log = torchrun(arguments("two", **flags))
    succeed(command(*arguments("one", **flags, gradient_accumulation_steps=2)))
    assert process.wait(timeout=240) == 0, log.read_text()
    for name in ("preview", "validation-2", "rollout-2", "retention-2"):
        one, two = (Image.open(tmp_path / folder / f"{name}.png") for folder in ("one", "two"))
        assert one.tobytes() == two.tobytes(), name
    assert [line for line in read_history(tmp_path / "two") if "retention" in line]
    exams = [json.loads((tmp_path / folder / "exam.json").read_text()) for folder in ("one", "two")]
    assert exams[0] == exams[1] and len(exams[0]["rows"]) == 3


@ONE_MODEL
@pytest.mark.exhaustive
@NEEDS_COMPILER
def test_two_processes_that_compile_give_the_lora_of_one_that_does_not(torchrun, command, arguments, tmp_path):
    flags = {"learning_rate": 1e-3, "max_train_steps": 3, "lora_dropout": 0.1, "lora_layers": "attn.to_out"}
    process, log = torchrun(arguments("two", **flags, compile=True, gradient_accumulation_steps=2))
    succeed(command(*arguments("one", **flags, gradient_accumulation_steps=4)))
    assert process.wait(timeout=580) == 0, log.read_text()
    assert "Compiled " in log.read_text() and "the compiler failed" not in log.read_text(), log.read_text()
    assert_close_weights(tmp_path / "one", tmp_path / "two", atol=1e-5, rtol=1e-3)


FAILS_ONCE_ON_ONE_PROCESS = """
import os, runpy, sys
sys.path.insert(0, {root!r})
from dopsd.gallery import Gallery
draw, has_failed = Gallery.student_drawing, []
def fail_once(self, prompt, seed):
    if os.environ["RANK"] == "1" and not has_failed:
        has_failed.append(True)
        raise RuntimeError("no memory")
    return draw(self, prompt, seed)
Gallery.student_drawing = fail_once
runpy.run_path({script!r}, run_name="__main__")
"""


@ONE_MODEL
@pytest.mark.exhaustive
def test_a_drawing_that_fails_on_one_process_costs_one_validation(torchrun, model, arguments, tmp_path):
    script = tmp_path / "fails.py"
    names = {"root": str(model.script_path.parent), "script": str(model.script_path)}
    script.write_text(FAILS_ONCE_ON_ONE_PROCESS.format(**names))
    flags = {"validation_steps": 2, "num_validation_images": 2, "max_train_steps": 4}
    process, log = torchrun(arguments("two", **flags), script)
    assert process.wait(timeout=240) == 0, log.read_text()
    assert "Validation at step 2 failed (no memory); the run continues" in log.read_text()
    assert not (tmp_path / "two/validation-2.png").exists() and (tmp_path / "two/validation-4.png").exists()


@ONE_MODEL
def test_sigterm_under_torchrun_saves_and_another_number_of_processes_continues(
    torchrun, command, arguments, tmp_path
):
    flags = {"learning_rate": 1e-3, "max_train_steps": 60, "lora_dropout": 0.1, "lr_scheduler": "cosine"}
    flags |= {"checkpointing_steps": 9999, "resume_from_checkpoint": "latest"}
    folder = tmp_path / "two"
    process, log = torchrun(arguments("two", **flags))
    wait_until(lambda: len(read_history(folder)) >= 3, process, log)
    process.send_signal(signal.SIGTERM)
    process.wait(timeout=60)
    (checkpoint,) = list_checkpoints(folder)
    step = checkpoint_step(checkpoint)
    assert 3 <= step < 60 and f"Stopped after step {step}" in log.read_text()
    succeed(command(*arguments("undisturbed", **flags, gradient_accumulation_steps=2)))
    succeed(command(*arguments("two", **flags, gradient_accumulation_steps=2)))
    assert_close_weights(tmp_path / "undisturbed", folder, atol=1e-3, rtol=1e-2)


@ONE_MODEL
def test_a_loss_that_is_not_finite_on_one_process_stops_both(torchrun, command, arguments, tmp_path):
    succeed(command(*arguments("first", context_cache_dir=tmp_path / "cache")))
    entries = sorted((tmp_path / "cache").glob("*/*.safetensors"))
    cache = ContextCache(tmp_path / "cache")
    references = [path for path in entries if next(iter(load_file(path).values())).ndim == 4]
    tensor = next(iter(load_file(references[0]).values()))
    cache.save(references[0].stem, torch.full_like(tensor, float("nan")))
    process, log = torchrun(arguments("two", context_cache_dir=tmp_path / "cache", max_train_steps=20))
    assert process.wait(timeout=240) != 0
    assert "the loss is nan" in log.read_text()
    assert not (tmp_path / "two" / LORA_FILE).exists()
    history = [json.loads(line) for line in (tmp_path / "two/metrics.jsonl").read_text().splitlines()]
    assert len(history) < 2  # three pictures, two per step: the damaged one is in step 1 or 2


@ONE_MODEL
def test_two_processes_share_pictures_and_cache(torchrun, arguments, tmp_path):
    flags = {"context_cache_dir": tmp_path / "cache", "max_train_steps": 1}
    process, log = torchrun(arguments("cold", **flags))
    assert process.wait(timeout=240) == 0, log.read_text()
    assert "Encoding 2 of 2 prompts and 3 of 3 pictures" in log.read_text()
    damaged = sorted((tmp_path / "cache").glob("*/*.safetensors"))[-1]
    damaged.write_bytes(damaged.read_bytes()[:-1])
    process, log = torchrun(arguments("warm", **flags))
    assert process.wait(timeout=240) == 0, log.read_text()
    assert re.search("Encoding (1 of 2 prompts and 0 of 3|0 of 2 prompts and 1 of 3) pictures", log.read_text())
    assert ContextCache(tmp_path / "cache").is_valid(damaged.stem)


@ONE_MODEL
@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["0.png", "2.png"])
def test_a_damaged_picture_in_either_processs_share_ends_both(torchrun, arguments, photos, tmp_path, name):
    folder = shutil.copytree(photos, tmp_path / "damaged")
    (folder / name).write_bytes(b"no picture")
    process, log = torchrun(arguments(instance_data_dir=folder))
    assert process.wait(timeout=120) != 0
    errors = [line for line in log.read_text().splitlines() if f"error: {name}: cannot be read as a picture" in line]
    assert errors and "Error: " not in errors[0]


@ONE_MODEL
def test_accelerate_launch_starts_the_script(model, arguments, tmp_path):
    launcher = [Path(sys.executable).parent / "accelerate", "launch", "--cpu", "--num_processes", "1"]
    done = subprocess.run(
        [*launcher, model.script_path, *arguments()], cwd=tmp_path, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / LORA_FILE).exists()
