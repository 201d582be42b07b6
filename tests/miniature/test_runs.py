import json

import pytest
import torch

import train_dopsd_flux2
from benchmarks.miniature import runs as runs_module
from benchmarks.miniature.concepts import CONCEPTS
from benchmarks.miniature.files import MODEL
from benchmarks.miniature.methods import (
    ABLATIONS,
    BASE,
    DOPSD,
    FIRST_TABLE,
    SFT,
    SFT_STOPPED,
    SHARED_FLAGS,
    Method,
    Run,
    SharedSettings,
    runs_of,
)
from benchmarks.miniature.runs import AccuracyStop, Experiment, TrainingFailed, dopsd_flags
from dopsd.command_line import parse_settings
from pipelines.published import KLEIN_LORA_LAYERS


OBJECT = CONCEPTS[0]


def test_the_training_script_takes_the_flags_and_trains_like_the_baselines(tmp_path):
    flags = dopsd_flags(
        tmp_path / "model",
        tmp_path,
        tmp_path / "out",
        seed=1,
        num_steps=50,
        retention_prompts=["a ball", "a box"],
        teacher="base",
    )
    settings = parse_settings(train_dopsd_flux2.MODEL, "", sum(flags, [])).flat()
    expected = SHARED_FLAGS | {"teacher": "base", "seed": 1, "max_train_steps": 50}
    expected["retention_prompts"] = ["a ball", "a box"]
    # What the baselines do without asking: AdamW with its usual betas, clipping at 1, no dropout, all layers.
    expected |= {"optimizer": "adamw", "adam_beta1": 0.9, "adam_beta2": 0.999, "adam_weight_decay": 0.0}
    expected |= {"max_grad_norm": 1.0, "lora_dropout": 0.0, "lora_layers": KLEIN_LORA_LAYERS}
    expected["lora_alpha"] = SharedSettings().lora_alpha
    assert {name: settings[name] for name in expected} == expected


def test_runs_share_a_folder_only_if_their_settings_are_equal():
    folders = [Run(OBJECT, 0, method).folder for method in (*FIRST_TABLE, *ABLATIONS)]
    repeated = {folder for folder in folders if folders.count(folder) > 1}
    assert repeated == {Run(OBJECT, 0, method).folder for method in (SFT, DOPSD)}
    prefix = "transformer_blocks." * 10  # too long for a folder's name
    layers = [Run(OBJECT, 0, Method("x", flags={"lora_layers": prefix + end})).folder for end in ("a", "b")]
    assert layers[0] != layers[1]


def test_there_is_one_run_per_concept_and_seed_except_for_the_base():
    assert len({run.folder for run in runs_of(DOPSD, CONCEPTS, (0, 1, 2))}) == 9
    assert [run.seed for run in runs_of(BASE, CONCEPTS, (0, 1, 2))] == [0, 0, 0]


@pytest.fixture
def experiment(tmp_path):
    """Three training steps; an accuracy is measured after the second."""
    return Experiment(MODEL, tmp_path, num_train_steps=3, steps_per_evaluation=2, eval_count=16)


def known_result(experiment: Experiment, method: Method, result: dict) -> None:
    folder = experiment.folder / Run(OBJECT, 0, method).folder
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps(result))


@pytest.mark.parametrize(
    ("wanted", "trained"), [(0, {"reached": True, "steps": 2}), (2, {"reached": False, "steps": 3})]
)
def test_a_baseline_stops_at_an_accuracy_or_reports_that_it_missed_it(experiment, wanted, trained):
    known_result(experiment, DOPSD, {"new": {"exact": wanted}})
    assert experiment.train_baseline(Run(OBJECT, 0, SFT_STOPPED)) == trained


def test_an_accuracy_is_measured_at_intervals_and_may_be_reached_late():
    accuracies = iter([0.1, 0.7])
    stop = AccuracyStop(lambda: next(accuracies), wanted=0.6, interval=3)
    assert [stop(step) for step in range(1, 7)] == [False] * 5 + [True] and stop.reached


def test_a_run_is_trained_once_and_measured_once(experiment, monkeypatch):
    run = Run(OBJECT, 0, SFT)
    result = experiment.result(run)
    assert result["steps"] == 3 and result["retention"] > 0.01
    assert set(result["new"]) == set(result["old"]) and 0 <= result["old"]["exact"] <= 1
    monkeypatch.setattr(Experiment, "train_baseline", lambda self, run: pytest.fail("trained again"))
    (experiment.folder / run.folder / "result.json").unlink()
    assert experiment.result(run) == result  # measured again
    monkeypatch.setattr(Experiment, "_measure", lambda self, run: pytest.fail("measured again"))
    assert experiment.result(run) == result


def test_the_shared_base_latents_do_not_change_with_the_pipeline(experiment):
    base = experiment.evaluator.load()
    assert experiment.evaluator.retention(base) == 0
    with torch.no_grad():
        base.transformer.proj_out.weight.mul_(1.1)
    assert experiment.evaluator.retention(base) > 0.01


@pytest.mark.parametrize(
    ("script", "message", "log"),
    [
        ("import sys; sys.exit('--rank 0: too small')", "ended with exit status 1", "--rank 0: too small"),
        ("import sys; print(sys.argv)", "logged no retention", "--adam_epsilon"),
    ],
)
def test_a_failed_training_is_reported_with_its_log(experiment, monkeypatch, tmp_path, script, message, log):
    (tmp_path / "script.py").write_text(script)
    monkeypatch.setattr(runs_module, "TRAINING_SCRIPT", tmp_path / "script.py")
    run = Run(OBJECT, 0, DOPSD)
    with pytest.raises(TrainingFailed, match=f"training.log: the training script {message}"):
        experiment.result(run)
    assert log in (tmp_path / run.folder / "training.log").read_text()
