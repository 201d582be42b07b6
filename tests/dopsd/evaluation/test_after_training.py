"""--evaluate: the flags that follow from a run, what is refused before it, and what becomes of a failure."""

import logging
import os
import shlex
import sys
from types import SimpleNamespace

import pytest
import torch

import train_dopsd_flux2
from dopsd.command_line import parse_settings
from dopsd.errors import InputError
from dopsd.evaluation import after_training
from dopsd.evaluation.after_training import (
    check_evaluation,
    environment,
    evaluate_run,
    evaluation_flags,
    evaluation_folder,
)
from dopsd.evaluation.comparison import Column, Comparison, Figure, Prompt
from dopsd.evaluation.results import write_results
from dopsd.evaluation.settings import parse_settings as parse_evaluation_settings
from short_runs import as_arguments


def run_settings(**flags):
    given = {
        "pretrained_model_name_or_path": "a/b",
        "instance_data_dir": "photos",
        "output_dir": "runs/my=dog",
        "seed": 7,
        "trigger_word": ["sks=dog", "zwx"],
        "evaluate": "pet",
    }
    return parse_settings(train_dopsd_flux2.MODEL, "", as_arguments(given | flags))


def as_evaluated(settings):
    """The settings of evaluate_lora.py that follow from a run's."""
    check_evaluation(settings)
    return parse_evaluation_settings({"default_vlm": "", "deployed_steps": ""}, "", evaluation_flags(settings))


def test_the_flags_follow_from_the_run():
    given = {"revision": "v2", "max_sequence_length": 64, "instance_prompt": "a photo of sks dog"}
    settings = run_settings(mixed_precision="bf16", validation_height=512, **given)
    found = as_evaluated(settings)
    assert (found.pretrained_model_name_or_path, found.revision, found.mixed_precision) == ("a/b", "v2", "bf16")
    assert found.lora == ["my-dog=runs/my=dog"] and found.instance_data_dir == "photos"
    assert (found.kind, found.trigger_word, found.class_word, found.seed) == ("pet", "sks", "dog", 7)
    assert (found.height, found.width, found.num_inference_steps, found.max_sequence_length) == (512, 1024, 4, 64)
    assert found.output_dir == str(evaluation_folder(settings)) == "runs/my=dog/evaluation"
    assert found.variant is None and not found.judge and found.instance_prompt == "a photo of sks dog"


def test_more_flags_are_passed_on_and_win():
    added = ["num_seeds=2", "lora=other=x.safetensors", "strengths=0.5", "strengths=0.25", "judge=true", "--seed=3"]
    found = as_evaluated(run_settings(evaluate_with=added))
    assert (found.num_seeds, found.seed, found.judge) == (2, 3, True)
    assert found.lora == ["my-dog=runs/my=dog", "other=x.safetensors"] and found.strengths == [0.25, 0.5, 1.0]


def test_an_editor_edits_the_pictures_of_its_validation():
    settings = run_settings(
        evaluate="edit",
        trigger_word=["zwx=an oil painting"],
        cond_image_column=["before"],
        validation_prompt=["a", "b"],
        validation_image=["x.png,y.png", "x.png"],
    )
    found = as_evaluated(settings)
    assert found.validation_image == ["x.png", "y.png"] and found.cond_image_column == ["before"]


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"evaluate": None, "evaluate_with": ["num_seeds=2"]}, "--evaluate_with: goes with --evaluate"),
        ({"train_mode": "full", "rank": None}, "--evaluate pet: compares LoRAs; drop it, or save one"),
        ({"instance_data_dir": None, "dataset_name": "a/b"}, "--evaluate pet: reads the training pictures from a"),
        ({"evaluate_with": ["num_seeds"]}, "--evaluate_with num_seeds: write NAME=VALUE"),
        ({"evaluate_with": ["num_sheep=2"]}, "evaluate_lora.py has no flag --num_sheep"),
        ({"evaluate_with": ["output_dir=x"]}, "--output_dir follows from the run"),
        ({"evaluate_with": ["num_seeds=100"]}, "--evaluate pet: --num_seeds 100: must be"),
        ({"evaluate": "edit", "trigger_word": None}, "--evaluate edit: --kind edit: needs pictures to edit"),
        ({"evaluate": "style", "evaluate_with": ["mask_background=true"]}, "--evaluate style: --mask_background"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_before_training(flags, message):
    with pytest.raises(InputError) as error:
        check_evaluation(run_settings(**flags))
    assert str(error.value).startswith(message) or message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_wrong_value_ends_with_one_line(capsys):
    with pytest.raises(SystemExit) as error:
        check_evaluation(run_settings(evaluate_with=["num_seeds=many"]))
    assert error.value.code == 2 and "--num_seeds" in capsys.readouterr().err


def test_other_sources_of_pictures_and_extracted_loras_are_allowed():
    check_evaluation(run_settings(evaluate=None))
    check_evaluation(
        run_settings(instance_data_dir=None, dataset_name="a/b", evaluate_with=["instance_data_dir=photos"])
    )
    check_evaluation(run_settings(train_mode="full", extract_lora=4))


def test_the_evaluation_is_no_process_of_the_launchers(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "TORCHELASTIC_RUN_ID", "ROLE_RANK", "GROUP_RANK"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    monkeypatch.setenv("MASTERPIECE", "kept")
    found = environment()
    assert not {*found} & {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "TORCHELASTIC_RUN_ID", "ROLE_RANK"}
    assert found["CUDA_VISIBLE_DEVICES"] == "3" and found["MASTERPIECE"] == "kept" and "PATH" in found


# The call


class Component(torch.nn.Linear):
    """Remembers where it was moved."""

    def __init__(self):
        super().__init__(1, 1)
        self.moves = 0

    def _apply(self, function, recurse=True):
        self.moves += 1
        return super()._apply(function, recurse)


@pytest.fixture
def pipeline():
    return SimpleNamespace(components={"transformer": Component(), "scheduler": object(), "text_encoder": None})


@pytest.fixture
def optimizer():
    """With a state."""
    weight = torch.nn.Parameter(torch.ones(1))
    weight.grad = torch.ones(1)
    adam = torch.optim.AdamW([weight])
    adam.step()
    return adam


@pytest.fixture
def script(tmp_path, monkeypatch):
    """Stands in for evaluate_lora.py."""

    def write(text: str):
        path = tmp_path / "script.py"
        path.write_text(text)
        monkeypatch.setattr(after_training, "SCRIPT", path)

    return write


def small_comparison() -> Comparison:
    column = Column("likeness/dino", "likeness (DINO)", "higher", "How alike.", "dino-model")
    figures = {"base": {column.key: Figure(0.25, 0.1, None, 4)}, "run": {column.key: Figure(0.75, 0.1, None, 4)}}
    return Comparison({}, [Prompt("a", "a", "concept")], [column], figures, {}, [])


def test_what_was_found_is_returned(tmp_path, pipeline, optimizer, script):
    settings = run_settings(output_dir=tmp_path / "run")
    folder = evaluation_folder(settings)
    folder.mkdir(parents=True)
    write_results(folder, small_comparison())
    script(f"import sys; open({str(tmp_path / 'arguments')!r}, 'w').write('\\n'.join(sys.argv[1:]))")
    assert evaluate_run(settings, pipeline, optimizer) == small_comparison()
    assert (tmp_path / "arguments").read_text().splitlines() == evaluation_flags(settings)
    assert pipeline.components["transformer"].moves == 1 and not optimizer.state


def test_without_the_flag_nothing_is_done(tmp_path, pipeline, optimizer, script):
    script(f"open({str(tmp_path / 'ran')!r}, 'w')")
    assert evaluate_run(run_settings(evaluate=None), pipeline, optimizer) is None
    assert not (tmp_path / "ran").exists() and pipeline.components["transformer"].moves == 0
    assert optimizer.state


@pytest.mark.parametrize(
    "text, problem",
    [
        ("import sys; sys.exit(3)", "evaluate_lora.py ended with exit status 3"),
        ("", "is not the results.json of a comparison"),
    ],
)
def test_a_failure_is_a_warning_that_says_how_to_evaluate_later(
    tmp_path, pipeline, optimizer, script, caplog, text, problem
):
    script(text)
    settings = run_settings(output_dir=tmp_path / "run")
    with caplog.at_level(logging.WARNING):
        assert evaluate_run(settings, pipeline, optimizer) is None
    (warning,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert "--evaluate pet: " in warning and problem in warning and "the weights are saved" in warning
    assert f"script.py {shlex.join(evaluation_flags(settings))}" in warning


def test_a_script_that_cannot_be_started_is_a_warning(tmp_path, pipeline, optimizer, monkeypatch, caplog):
    monkeypatch.setattr(sys, "executable", os.fspath(tmp_path / "no-python"))
    assert evaluate_run(run_settings(output_dir=tmp_path / "run"), pipeline, optimizer) is None
    assert "No such file" in caplog.text and "the weights are saved" in caplog.text
