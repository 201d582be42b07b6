import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import train_dopsd_flux2
from benchmarks.miniature import costs as costs_module
from benchmarks.miniature import runs as runs_module
from benchmarks.miniature.concepts import CONCEPTS, RENAMING, prior_prompts
from benchmarks.miniature.experiment import make_work
from benchmarks.miniature.files import MODEL
from benchmarks.miniature.klein import KLEIN, Klein
from benchmarks.miniature.methods import (
    BASE,
    DOPSD,
    DOPSD_BOTH,
    PRIOR_TABLE,
    RENAMING_TABLE,
    SFT,
    SFT_PRIOR,
    SFT_STOPPED,
    SHARED_FLAGS,
    Method,
    Run,
    SharedSettings,
    runs_of,
)
from benchmarks.miniature.plans import klein_plan, zimage_plan
from benchmarks.miniature.runs import (
    NUM_TIMED_STEPS,
    AccuracyStop,
    Experiment,
    TrainingFailed,
    dopsd_flags,
    prior_flags,
)
from dopsd.command_line import parse_settings
from dopsd.history import read_history
from pipelines.published import KLEIN_LORA_LAYERS


OBJECT = CONCEPTS[0]


def test_the_training_script_takes_the_flags_and_trains_like_the_baselines(tmp_path):
    flags = dopsd_flags(
        MODEL,
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


@pytest.mark.parametrize(("make", "num_folders"), [(klein_plan, 60), (zimage_plan, 30)])
def test_runs_share_a_folder_only_if_their_settings_are_equal(make, num_folders):
    methods = [method for comparison in make(is_quick=False).comparisons for method in comparison.methods]
    settings = {}
    for method in methods:
        settings.setdefault(Run(OBJECT, 0, method).folder, set()).add(str(replace(method, name="")))
    assert len(settings) > num_folders and all(len(different) == 1 for different in settings.values())
    prefix = "transformer_blocks." * 10  # too long for a folder's name
    layers = [Run(OBJECT, 0, Method("x", flags={"lora_layers": prefix + end})).folder for end in ("a", "b")]
    assert layers[0] != layers[1]


def test_there_is_one_run_per_concept_and_seed_except_for_the_base():
    assert len({run.folder for run in runs_of(DOPSD, CONCEPTS, (0, 1, 2))}) == 9
    assert [run.seed for run in runs_of(BASE, CONCEPTS, (0, 1, 2))] == [0, 0, 0]


@pytest.mark.parametrize(("make", "num_runs"), [(klein_plan, 200), (zimage_plan, 90)])
def test_every_trained_run_is_measured_stacked_and_timed_where_the_tables_say_so(make, num_runs):
    plan = make(is_quick=False)
    work = make_work(plan)
    assert len({run.folder for run in work.runs}) == len(work.runs) > num_runs
    assert {run.folder for run in work.stacks} < {run.folder for run in work.runs}
    assert {run.folder for run in work.by_step_count} < {run.folder for run in work.runs}
    shown = {method.name for method in plan.shown.values()}
    assert shown <= {method.name for method in plan.comparisons[0].methods}
    for run in work.stacks:
        assert run.method.is_trained and run.concept in CONCEPTS
        assert all(
            replace(run, concept=concept).folder in {other.folder for other in work.stacks} for concept in CONCEPTS
        )
    folders = [runs_module.timed_run(run).folder for run in work.timed]
    assert len({*folders}) == len(folders) < len(work.runs) / 3


def test_prior_preservation_gets_prompts_and_the_word(tmp_path):
    assert prior_flags(DOPSD, OBJECT, tmp_path) == {}
    assert prior_flags(DOPSD_BOTH, OBJECT, tmp_path) == {
        "prior_prompts": tmp_path / "prior_prompts.txt",
        "trigger_word": OBJECT.word,
    }
    assert (tmp_path / "prior_prompts.txt").read_text().splitlines() == prior_prompts()
    without_word, avoiding = PRIOR_TABLE[2], RENAMING_TABLE[-1]
    assert not without_word.names_word and "trigger_word" not in prior_flags(without_word, OBJECT, tmp_path)
    prior_flags(avoiding, RENAMING, tmp_path)
    assert RENAMING.word not in (tmp_path / "prior_prompts.txt").read_text()


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
    known_result(experiment, DOPSD, {"new": {"exact": wanted}, "steps": 3})
    assert experiment.train_baseline(Run(OBJECT, 0, SFT_STOPPED)) == trained


def test_an_accuracy_is_measured_at_intervals_and_may_be_reached_late():
    accuracies = iter([0.1, 0.7])
    stop = AccuracyStop(lambda: next(accuracies), wanted=0.6, interval=3)
    assert [stop(step) for step in range(1, 7)] == [False] * 5 + [True] and stop.reached


def test_a_run_is_trained_once_and_measured_once(experiment, monkeypatch):
    run = Run(OBJECT, 0, SFT)
    result = experiment.result(run)
    assert result["steps"] == 3 and result["retention"] > 1e-3
    assert set(result["new"]) == set(result["old"]) and 0 <= result["old"]["exact"] <= 1
    monkeypatch.setattr(Experiment, "train_baseline", lambda self, run: pytest.fail("trained again"))
    (experiment.folder / run.folder / "result.json").unlink()
    assert experiment.result(run) == result  # measured again
    monkeypatch.setattr(Experiment, "_measure", lambda self, run: pytest.fail("measured again"))
    assert experiment.result(run) == result


def test_a_baseline_with_prior_pictures_is_trained_from_the_bases_pictures(experiment, monkeypatch):
    monkeypatch.setattr(costs_module, "NUM_PRIOR_PICTURES", 3)
    drawn = []
    draw = runs_module.draw_prior_pictures
    monkeypatch.setattr(
        runs_module,
        "draw_prior_pictures",
        lambda pipeline, prompts, *args, **kwargs: drawn.extend(prompts) or draw(pipeline, prompts, *args, **kwargs),
    )
    assert experiment.train_baseline(Run(OBJECT, 0, SFT_PRIOR)) == {"steps": 3}
    assert len(drawn) == 3 and not any(OBJECT.word in prompt for prompt in drawn)


@pytest.mark.exhaustive
def test_costs_stacks_and_times_join_the_result_once_they_are_measured(experiment):
    run = Run(OBJECT, 0, SFT)
    others = [replace(run, concept=concept) for concept in CONCEPTS[1:]]
    plain = experiment.result(run)
    assert plain["forwards"] == round(SFT.cost(3, KLEIN)) and "stack" not in plain and "seconds" not in plain
    assert 0 <= plain["neighbours"]["exact"] <= 1 and plain["wrong_words"]["exact"] < 0.1
    for other in others:
        experiment.result(other)
    stack = experiment.stack(run)
    seconds = experiment.step_seconds(run)
    result = experiment.result(run)
    assert result["stack"] == stack and 0 <= stack["exact"] <= 1 and stack["old"] > 0.5
    assert result["seconds"] == pytest.approx(3 * seconds, abs=0.06) and seconds > 0
    assert not (experiment.folder / "runs" / "object" / "0" / "pictures").exists()


@pytest.mark.exhaustive
def test_a_run_of_the_script_is_timed_without_sheets_in_a_folder_of_its_own(experiment, monkeypatch):
    trained = []
    train = Experiment.train_dopsd

    def spy(self, run, **changed):
        result = train(self, run, **changed)
        trained.append((self.folder, len(read_history(self.folder / run.folder)), changed))
        return result

    monkeypatch.setattr(Experiment, "train_dopsd", spy)
    assert experiment.step_seconds(Run(CONCEPTS[1], 2, DOPSD_BOTH)) > 0
    ((folder, num_lines, changed),) = trained
    assert num_lines == NUM_TIMED_STEPS and changed == {"validation_steps": 0} and folder != experiment.folder
    assert not Path(folder).exists()


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
    monkeypatch.setattr(Klein, "script", tmp_path / "script.py")
    run = Run(OBJECT, 0, DOPSD)
    with pytest.raises(TrainingFailed, match=f"training.log: the training script {message}"):
        experiment.result(run)
    assert log in (tmp_path / run.folder / "training.log").read_text()
