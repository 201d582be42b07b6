"""Whole runs with sampled states and with prior preservation: what they leave, and that they resume."""

import json
import shutil

import pytest

from command_line import same_weights, succeed
from dopsd.history import read_history
from models import EVERY_CONTEXT, ONE_MODEL, SLOW, both_models
from short_runs import PUBLISHED


PRIOR = {
    "with_prior_preservation": True,
    "trigger_word": "ball=thing",
    "num_trained_states": 2,
    "prior_loss_weight": 2,
}
DEFAULTS = dict.fromkeys(PUBLISHED)


@both_models(quick="flux2")
def test_by_default_a_run_trains_on_one_state_with_prior_preservation(train, tmp_path):
    log = succeed(train(**DEFAULTS, max_train_steps=3)).log
    assert log.count("--trigger_word: not given; ") == 1
    history = read_history(tmp_path / "run")
    assert len(history) == 3 and history[0]["prior_loss"] == 0 < history[2]["prior_loss"]
    for row in history:
        for prefix in ("loss/state_", "prior_loss/state_"):
            assert len([name for name in row if name.startswith(prefix)]) == 1


@both_models(quick="flux2")
@SLOW
def test_the_defaults_are_encoded_drawn_and_trained_with_a_teacher_that_reads_captions(train, photos, tmp_path):
    data = shutil.copytree(photos, tmp_path / "data")
    rows = [{"file_name": f"{n}.png", "short": f"ball {n}", "long": f"a ball, number {n}"} for n in range(3)]
    (data / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = DEFAULTS | {"instance_data_dir": data, "instance_prompt": None, "caption_column": "short"}
    flags |= {"teacher_context": "caption", "teacher_caption_column": "long"}
    flags |= {"vlm_model_name_or_path": None, "vlm_min_pixels": None, "vlm_max_pixels": None}
    flags |= {"validation_steps": 2, "num_validation_images": 1, "validation_prompt": "a ball"}
    assert "The context cache is complete" in succeed(train(**flags, encode_only=True)).log
    log = succeed(train(**flags, preview_only=True)).log
    assert "Encoding 0 of " in log and "Steps:" not in log and (tmp_path / "run/preview.png").exists()
    assert "Encoding 0 of " in succeed(train(**flags)).log
    rows = read_history(tmp_path / "run")
    assert all("prior_loss" in row for row in rows if "loss" in row) and "retention/held_out" in rows[-1]


@ONE_MODEL
@SLOW
def test_a_run_without_the_defaults_resumes_only_without_them(train, tmp_path):
    succeed(train("whole", max_train_steps=3))
    succeed(train(checkpointing_steps=2))
    resumed = {"resume_from_checkpoint": "latest", "max_train_steps": 3}
    assert train(**resumed, **DEFAULTS).error.endswith(
        "--resume_from_checkpoint checkpoint-2: its --num_trained_states was 4, now it is 1, and it had no prior "
        "preservation (--with_prior_preservation false); pass the same, or start in another --output_dir"
    )
    succeed(train(**resumed))
    assert same_weights(tmp_path / "whole", tmp_path / "run")


@ONE_MODEL
def test_more_trained_states_than_the_rollout_has_are_one_line(train):
    error = train(num_trained_states=5).error
    assert "--num_trained_states 5: the rollout has only 4 states; pass fewer, or raise --num_rollout_steps" in error


@pytest.fixture
def prior(tmp_path):
    """Flags of prior preservation with a few prompts: a tiny model's text limit is short."""
    path = tmp_path / "prompts.txt"
    path.write_text("a house\na tree\na car\n", encoding="utf-8")
    return PRIOR | {"prior_prompts": path}


@EVERY_CONTEXT
@SLOW
def test_prior_preservation_is_logged_and_resumed_bit_for_bit(train, prior, tmp_path):
    flags = prior | {"max_train_steps": 4, "prior_every": 2, "lora_dropout": 0.1}
    succeed(train("undisturbed", **flags))
    succeed(train("resumed", **flags | {"max_train_steps": 3}, checkpointing_steps=3))
    succeed(train("resumed", **flags, resume_from_checkpoint="latest"))
    assert same_weights(tmp_path / "undisturbed", tmp_path / "resumed")
    history = read_history(tmp_path / "undisturbed")
    assert ["prior_loss" in row for row in history] == [True, False, True, False]
    assert history[0]["prior_loss"] == 0 < history[2]["prior_loss"]


@ONE_MODEL
@SLOW
def test_other_prior_prompts_are_refused_on_resuming(train, prior, tmp_path):
    succeed(train(**prior, checkpointing_steps=2))
    (tmp_path / "prompts.txt").write_text("a house\na bus\na car\n", encoding="utf-8")
    error = train(**prior, resume_from_checkpoint="latest", max_train_steps=3).error
    assert "checkpoint-2: its prior preservation was set differently (--with_prior_preservation, " in error


@ONE_MODEL
@SLOW
def test_held_out_wrong_word_and_no_word_are_measured_and_drawn(train, prior, tmp_path):
    succeed(train(**prior, validation_steps=2, num_validation_images=1, retention_prompts=["a", "b"]))
    (row,) = [row for row in read_history(tmp_path / "run") if "retention" in row]
    names = {"retention/held_out", "retention/wrong_word", "retention/no_word"}
    assert names < row.keys() and all(row[name] >= 0 for name in names)


@ONE_MODEL
@SLOW
def test_the_default_prompts_that_are_too_long_for_a_model_are_left_out(train, tmp_path):
    log = succeed(train(with_prior_preservation=True, trigger_word="ball", no_context_cache=True)).log
    assert "Steps:" in log and "shorten it" not in log
    assert all("prior_loss" in row for row in read_history(tmp_path / "run"))


@ONE_MODEL
@SLOW
def test_a_trigger_word_alone_is_only_drawn(train, tmp_path):
    succeed(train("plain"))
    flags = {"validation_steps": 2, "num_validation_images": 1, "retention_prompts": ["a", "b"]}
    succeed(train("drawn", trigger_word="ball", **flags))
    assert same_weights(tmp_path / "plain", tmp_path / "drawn")
    (row,) = [row for row in read_history(tmp_path / "drawn") if "retention" in row]
    assert "retention/wrong_word" in row and "retention/held_out" not in row
