"""`benchmarks.real_shapes` on a tiny model: the whole command, and what it makes of a run's files."""

import json
import sys

import pytest
import torch

from benchmarks.miniature.command_line import run
from benchmarks.real_shapes import __main__ as real_shapes
from benchmarks.real_shapes.checkpoint import SUBJECTS, Files
from benchmarks.real_shapes.runs import RUNS, Row, Run, Runner, planned
from dopsd.command_line import parse_settings
from dopsd.history import HISTORY_FILE
from train_dopsd_flux2 import MODEL


@pytest.fixture
def runner(tmp_path) -> Runner:
    return Runner(SUBJECTS["tiny"], MODEL, Files(tmp_path), num_steps=3, mode=(), run_limit=60)


@pytest.mark.exhaustive
def test_a_killed_run_is_resumed_and_drawn_and_a_run_that_fails_is_a_row(monkeypatch, tmp_path, capsys):
    arguments = ["--model", "tiny", "--work_dir", str(tmp_path), "--num_steps", "4", "--evaluated_run", "killed"]
    monkeypatch.setattr(sys, "argv", ["real_shapes", *arguments, "--runs", "broken=--rank x", "killed"])
    real_shapes.main()
    results = json.loads((tmp_path / "real-shapes-tiny.json").read_text())
    broken, killed = results["rows"]
    assert "--rank: invalid int value" in broken["error"] and broken["step_seconds"] == []
    assert killed["error"] is None and killed["change"] > 0
    assert len(killed["step_seconds"]) == 4 and killed["peak_gb"] > 0 and killed["host_gb"] > 0
    assert killed["planned_gb"].keys() == {"encoding: text encoder", "encoding: VAE", "training"}
    page = (tmp_path / "real-shapes-tiny.md").read_text()
    assert "| broken: `--rank x` | - | - |" in page and "| killed: `` | " in page
    assert "killed: " in capsys.readouterr().out
    compared, offloaded = results["evaluations"]
    assert compared["error"] is None and compared["num_drawn"] == 76 and compared["measuring_seconds"] > 0
    assert offloaded["error"] is None and offloaded["num_drawn"] == 28 and offloaded["drawing_gb"] > 0
    assert "`evaluate_lora.py --num_seeds 2 --strengths 0.5` | " in page
    log = (tmp_path / "tiny" / "logs" / "killed.log").read_text()
    assert "checkpoint-2" in log


@pytest.mark.parametrize("name", RUNS)
def test_the_flags_of_each_run_are_valid(runner, name):
    settings = parse_settings(MODEL, "", runner.command(name, list(RUNS[name].flags))[2:])
    assert settings.training.mixed_precision == "bf16" and settings.training.max_train_steps == 3
    assert (settings.teacher.vlm_model_name_or_path == str(runner.files.vlm)) == (name == "vlm")


def test_a_run_of_ones_own_has_its_flags_and_an_unknown_one_is_refused(monkeypatch, tmp_path):
    assert real_shapes.chosen_runs(["small=--rank 4 --compile"]) == {"small": Run(("--rank", "4", "--compile"))}
    monkeypatch.setattr(sys, "argv", ["real_shapes", "--model", "tiny", "--work_dir", str(tmp_path), "--runs", "x"])
    with pytest.raises(SystemExit, match="^--runs x: there is no such run"):
        run(real_shapes.main)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_real_model_is_refused_without_a_gpu(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["real_shapes", "--model", "klein-4B", "--work_dir", str(tmp_path / "work")])
    with pytest.raises(SystemExit, match="^--model klein-4b: needs a GPU; choose tiny on a CPU$"):
        run(real_shapes.main)
    assert not (tmp_path / "work").exists()


def test_metrics_are_read_and_checked(runner):
    folder = runner.output_dir("lora")
    runner.log("lora").parent.mkdir(parents=True)
    folder.mkdir(parents=True)
    runner.log("lora").write_text("Compiled 8 graphs for 2 block classes in 95 seconds\n")

    def read(*lines: dict) -> Row:
        (folder / HISTORY_FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))
        row = Row("lora", [])
        runner.read_metrics(row)
        return row

    steps = [{"step": n, "loss": 0.5, "seconds_per_step": n / 2, "peak_memory_gb": 5 - n} for n in (1, 2, 3)]
    row = read(steps[0], {"step": 1, "retention": 0.1}, *steps[1:])
    assert row.error is None and row.step_seconds == [0.5, 1, 1.5] and row.peak_gb == 4
    assert row.remarks == ["Compiled 8 graphs for 2 block classes in 95 seconds"]
    row.planned_gb = {"training": 4.5}
    assert real_shapes.cells(row)[:4] == ["1.5", "4", "4.5", "-"]
    assert read(*steps[:2]).error == "logged the steps [1, 2], not 1 to 3"
    assert read(*steps[:2], steps[2] | {"loss": float("nan")}).error == "a loss is not finite"


def test_the_plan_is_read():
    text = (
        "Planning; this takes up to a minute\nPlan of X, on H100, 80 GB; computed\n\n"
        "GB                        peak\n"
        "encoding: VAE              5.7   weights 0.17; activations 5.56\n"
        "training                  25.4   transformer 7.75; LoRA 0.76\n"
        "host memory               11.0\n\n"
        "A step: 638 TFLOP on average, at most 800.5   \n"
    )
    assert planned(text) == {"encoding: VAE": 5.7, "training": 25.4, "host memory": 11.0}
    assert planned("Traceback") == {}
