"""Whole runs with --evaluate: the comparison, the report and the card of a finished run."""

import json

import pytest
from huggingface_hub import ModelCard

from command_line import succeed, weights
from models import ONE_MODEL, SLOW
from tiny_features import make_tiny_clip, make_tiny_dino


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    """Flags of evaluate_lora.py with tiny feature models, one picture per prompt and few prompts."""
    folder = tmp_path_factory.mktemp("features")
    prompts = folder / "prompts.txt"
    prompts.write_text("a sks ball on grass\na sks ball in snow\n")
    clip, dino = make_tiny_clip(folder / "clip"), make_tiny_dino(folder / "dino")
    return [f"clip_model={clip}", f"dino_model={dino}", f"prompts={prompts}", "num_seeds=1", "strengths=1"]


@ONE_MODEL
@SLOW
def test_a_finished_run_is_evaluated(train, features, tmp_path):
    flags = {"evaluate": "object", "trigger_word": "sks=ball", "instance_prompt": "a sks ball"}
    result = succeed(train(**flags, evaluate_with=features))
    assert "Evaluating the LoRA" in result.log and "--evaluate object: " not in result.log
    folder = tmp_path / "run" / "evaluation"
    found = json.loads((folder / "results.json").read_text())
    assert {"base", "run"} <= found["figures"].keys() and (folder / "comparison.html").is_file()
    report = (tmp_path / "run/report.html").read_text()
    assert 'href="evaluation/comparison.html"' in report and "finished" in report
    card = ModelCard.load(tmp_path / "run/README.md").content
    assert "## Evaluation" in card and "| run |" in card and "evaluate_with" not in card


@ONE_MODEL
def test_a_failed_evaluation_does_not_lose_the_run(train, features, tmp_path):
    flags = {"evaluate": "object", "trigger_word": "sks", "instance_prompt": "a sks ball"}
    missing = tmp_path / "no-such-model"
    result = succeed(train(**flags, evaluate_with=[*features[1:], f"clip_model={missing}"]))
    assert "--evaluate object: evaluate_lora.py ended with exit status 1; the weights are saved" in result.log
    assert f"--clip_model {missing}" in result.log and "Traceback" not in result.log
    card, folder = tmp_path / "run/README.md", tmp_path / "run/evaluation"
    assert weights(tmp_path / "run") and "## Evaluation" not in card.read_text()
    # It was there before, since an evaluation takes long and may be killed.
    assert card.stat().st_mtime_ns < folder.stat().st_mtime_ns


@ONE_MODEL
def test_flags_of_the_evaluation_are_checked_before_training(train, tmp_path):
    flags = {"evaluate": "object", "trigger_word": "sks", "evaluate_with": "num_seeds=0"}
    assert "--evaluate object: --num_seeds 0: must be a whole number from 1 to 64" in train(**flags).error
    assert not (tmp_path / "run/context_cache").exists()
