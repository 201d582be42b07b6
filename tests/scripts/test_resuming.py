"""Runs that are interrupted and continued."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from command_line import LORA_FILE, same_weights, succeed
from dopsd.history import read_history
from models import ONE_MODEL, SLOW


OPTIMIZERS = {
    "adamw": {},
    "bf16-8bit": {"mixed_precision": "bf16", "use_8bit_adam": True, "rank": 128},
    "prodigy": {"optimizer": "prodigy", "learning_rate": 1.0},
}
DATA = {
    "cosine-dropout-flip": {
        "lr_scheduler": "cosine",
        "lr_warmup_steps": 2,
        "lora_dropout": 0.3,
        "random_flip": True,
        "repeats": 2,
    },
    "accumulation-buckets": {
        "gradient_accumulation_steps": 2,
        "train_batch_size": 2,
        "use_aspect_ratio_buckets": True,
        "aspect_ratio_buckets": "64,64;64,128;112,64",
    },
}
FLAGS = OPTIMIZERS | DATA


QUICK = (("flux2", "accumulation-buckets"), ("zimage", "cosine-dropout-flip"))
CASES = [("flux2", name) for name in FLAGS] + [("zimage", name) for name in DATA]


@pytest.mark.parametrize(
    ("model", "name"),
    [pytest.param(*case, marks=[] if case in QUICK else [SLOW]) for case in CASES],
    indirect=["model"],
)
def test_a_resumed_run_ends_with_the_same_weights(train, photos, tmp_path, name):
    data = shutil.copytree(photos, tmp_path / "data")
    rows = [{"file_name": f"{n}.png", "short": f"ball {n}", "long": f"ball {n}, round"} for n in range(3)]
    (data / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = {"instance_data_dir": data, "instance_prompt": None, "caption_column": ["short", "long"]}
    flags |= FLAGS[name] | {"checkpointing_steps": 3, "max_train_steps": 7}
    succeed(train("whole", **flags))
    shutil.copytree(tmp_path / "whole/checkpoint-3", tmp_path / "resumed/checkpoint-3")
    log = succeed(train("resumed", **flags, resume_from_checkpoint="latest")).log
    assert "steps: 3 to 7" in log
    assert same_weights(tmp_path / "whole", tmp_path / "resumed")
    whole, resumed = (
        load_file(tmp_path / folder / "checkpoint-6/adapters.safetensors") for folder in ("whole", "resumed")
    )
    assert whole and all(torch.equal(whole[key], resumed[key]) for key in whole)


@ONE_MODEL
def test_a_run_resumes_from_a_named_checkpoint_and_takes_its_drawn_seed(train, tmp_path):
    succeed(train(seed=None, checkpointing_steps=1, max_train_steps=2))
    shutil.copytree(tmp_path / "run/checkpoint-1", tmp_path / "again/checkpoint-1")
    log = succeed(train("again", seed=None, max_train_steps=2, resume_from_checkpoint="checkpoint-1")).log
    assert "No --seed was given" not in log and "steps: 1 to 2" in log
    assert same_weights(tmp_path / "run", tmp_path / "again")


@ONE_MODEL
def test_latest_without_a_checkpoint_starts_from_the_beginning(train, tmp_path):
    (tmp_path / "run/.checkpoint-1.tmp").mkdir(parents=True)  # what a killed run was writing
    assert "steps: 0 to 2" in succeed(train(resume_from_checkpoint="latest")).log
    assert not list((tmp_path / "run").glob(".checkpoint*"))


@ONE_MODEL
@SLOW
def test_a_resumed_run_continues_to_remove_the_oldest_checkpoints(train, tmp_path):
    succeed(train(checkpointing_steps=1, max_train_steps=3))
    result = train(checkpointing_steps=1, max_train_steps=4, resume_from_checkpoint="checkpoint-1")
    assert "holds newer checkpoints (checkpoint-1, checkpoint-2, checkpoint-3)" in result.error
    flags = {"checkpoints_total_limit": 1, "max_train_steps": 4, "resume_from_checkpoint": "latest"}
    succeed(train(checkpointing_steps=1, **flags))
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-4"]


@ONE_MODEL
def test_resuming_with_other_settings_is_one_line(train, tmp_path):
    succeed(train(checkpointing_steps=1))
    latest = {"resume_from_checkpoint": "latest", "max_train_steps": 3}
    result = train(**latest, rank=8)
    assert "its --rank was 4, now it is 8" in result.error and "Loading weights" not in result.log
    assert "its --seed was 0, now it is 5" in train(**latest, seed=5).error
    assert "steps: 2 to 3" in succeed(train(**latest)).log


@ONE_MODEL
def test_a_damaged_checkpoint_is_passed_over_and_costs_only_steps(train, tmp_path):
    succeed(train("undisturbed", max_train_steps=3))
    succeed(train(checkpointing_steps=1))
    adapters = tmp_path / "run/checkpoint-2/adapters.safetensors"
    content = bytearray(adapters.read_bytes())
    content[-1] ^= 1
    adapters.write_bytes(content)
    assert "adapters.safetensors is damaged" in train(resume_from_checkpoint="checkpoint-2").error
    log = succeed(train(checkpointing_steps=1, resume_from_checkpoint="latest", max_train_steps=3)).log
    assert "checkpoint-2: adapters.safetensors is damaged or from another checkpoint; trying the" in log
    assert "steps: 1 to 3" in log and (tmp_path / "run/checkpoint-2.damaged").is_dir()
    assert same_weights(tmp_path / "undisturbed", tmp_path / "run")


@ONE_MODEL
@SLOW
def test_a_resumed_run_has_one_history_and_draws_what_is_missing(train, tmp_path):
    flags = {"checkpointing_steps": 2, "max_train_steps": 5, "validation_steps": 2}
    flags |= {"num_validation_images": 1, "retention_prompts": ["a", "b"]}
    succeed(train(**flags))
    run = tmp_path / "run"
    whole = read_history(run)
    # As after a kill between checkpoint-4 and its validation, while a line was being written.
    cut = [json.dumps(line) + "\n" for line in whole if line["step"] < 5 and (line["step"] < 4 or "loss" in line)]
    (run / "metrics.jsonl").write_text("".join(cut) + '{"step": 5, "lo')
    for name in ("retention-4.png", LORA_FILE):
        (run / name).unlink()
    succeed(train(**flags, resume_from_checkpoint="latest"))
    again = read_history(run)
    assert [line["step"] for line in again] == [line["step"] for line in whole] == [1, 2, 2, 3, 4, 4, 5, 5]
    assert [line.get("loss") for line in again] == [line.get("loss") for line in whole]
    assert [line.get("retention") for line in again] == [line.get("retention") for line in whole]
    assert (run / "retention-4.png").exists()
