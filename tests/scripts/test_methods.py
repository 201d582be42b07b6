"""Whole runs with sampled states and with prior preservation: what they leave, and that they resume."""

import pytest

from command_line import same_weights, succeed
from dopsd.history import read_history
from models import EVERY_CONTEXT, ONE_MODEL, SLOW


PRIOR = {
    "with_prior_preservation": True,
    "trigger_word": "ball=thing",
    "num_trained_states": 2,
    "prior_loss_weight": 2,
}


@ONE_MODEL
@SLOW
def test_training_on_all_states_is_the_default(train, tmp_path):
    succeed(train("default"))
    succeed(train("all", num_trained_states=4))
    assert same_weights(tmp_path / "default", tmp_path / "all")
    succeed(train("one", num_trained_states=1))
    assert not same_weights(tmp_path / "default", tmp_path / "one")


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
