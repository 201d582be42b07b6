"""The shipped miniature: what it is, what it can, and the experiment on it from end to end."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import Flux2KleinPipeline
from PIL import Image

import experiment as experiment_module
import make
import world
from concepts import CONCEPTS
from exam import MODEL, standard_tasks
from experiment import (
    DOPSD,
    FIRST_TABLE,
    REPOSITORY,
    SFT,
    SFT_STOPPED,
    Experiment,
    Method,
    Run,
    run_side_by_side,
    runs_of,
    settings_of,
)
from metrics import PictureReader
from parts import MAX_SEQUENCE_LENGTH, check_settings, make_text_encoder, make_tokenizer
from report import write
from vae import to_tensor


@pytest.fixture(scope="module")
def stock_pipeline():
    pipeline = Flux2KleinPipeline.from_pretrained(MODEL)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_it_is_small_and_its_text_side_is_what_the_code_makes(stock_pipeline):
    files = [*MODEL.rglob("*.safetensors")]
    assert sum(file.stat().st_size for file in files) <= 30e6
    assert stock_pipeline.config.is_distilled and len(stock_pipeline.text_encoder.model.layers) == 28
    tokenizer = make_tokenizer()
    prompt = world.caption("striped red and blue diamond", "sand")
    assert stock_pipeline.tokenizer(prompt).input_ids == tokenizer(prompt).input_ids
    made = make_text_encoder(len(tokenizer)).state_dict()
    for name, weight in stock_pipeline.text_encoder.state_dict().items():
        assert torch.equal(weight, made[name]), name


@pytest.mark.parametrize("kind", ["text_seen", "text_unseen", "reference_seen", "reference_unseen"])
def test_stock_diffusers_draws_what_is_asked_for(stock_pipeline, kind):
    task = standard_tasks(20)[kind]
    pictures = []
    for number, prompt in enumerate(task.prompts):
        picture = stock_pipeline(
            prompt=prompt,
            image=task.references[number] if task.references else None,
            height=world.SIDE,
            width=world.SIDE,
            num_inference_steps=4,
            guidance_scale=1.0,
            generator=torch.Generator().manual_seed(number),
            max_sequence_length=MAX_SEQUENCE_LENGTH,
            output_type="np",
        ).images[0]
        pictures.append(2 * picture - 1)
    reader = PictureReader(world.all_appearances())
    figures = reader.accuracy(reader.read(to_tensor(np.stack(pictures))), task.wanted, task.backgrounds)
    assert figures["exact"] >= 0.9 and figures["background"] >= 0.9


def test_the_readmes_example_draws(monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    text = (MODEL.parent / "README.md").read_text()
    names = {}
    exec(text.split("```python\n")[1].split("```")[0], names)
    assert names["image"].size == (world.SIDE, world.SIDE)


@pytest.mark.slow
def test_an_experiment_runs_through_and_goes_on_where_it_stopped(tmp_path):
    settings = (MODEL, tmp_path, 12, 10, 24)  # steps of a run, steps between looks, pictures of each kind
    concepts, seeds = CONCEPTS[:1], (0,)
    first = {method.name: runs_of(method, concepts, seeds) for method in FIRST_TABLE}
    runs = [run for runs in first.values() for run in runs]
    sft, dopsd, stopped = (Run(CONCEPTS[0], 0, method) for method in (SFT, DOPSD, SFT_STOPPED))
    step_runs = [dopsd]
    run_side_by_side(Experiment.open(*settings), runs, step_runs, 2)
    experiment = Experiment.open(*settings)
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("result.json")}
    assert len(times) == len(FIRST_TABLE)
    weights = tmp_path / sft.folder / "pytorch_lora_weights.safetensors"
    trained_at = weights.stat().st_mtime_ns
    (tmp_path / sft.folder / "result.json").unlink()
    run_side_by_side(experiment, runs, step_runs, 1)
    changed = [path for path, time in times.items() if path.stat().st_mtime_ns != time]
    assert changed == [tmp_path / sft.folder / "result.json"]  # measured again, but not trained again
    assert weights.stat().st_mtime_ns == trained_at

    assert experiment.result(sft)["retention"] > 0.01
    result = experiment.result(dopsd)
    assert result["retention"] == pytest.approx(result["retention_logged"], abs=1e-3) and result["retention"] > 0

    path, origin = tmp_path / "settings.json", f"--output_dir {tmp_path}"
    check_settings(path, settings_of(experiment), origin=origin)
    check_settings(path, settings_of(experiment), origin=origin)
    with pytest.raises(ValueError, match="--output_dir .* another num_train_steps \\(12, now 13\\)"):
        check_settings(path, settings_of(replace(experiment, num_train_steps=13)), origin=origin)

    write(experiment, first, {}, {"D-OPSD": step_runs})
    text = (tmp_path / "results.md").read_text()
    assert text.count("| D-OPSD |") == 6  # in the table, in the concept's, and for each number of sampling steps
    assert set(json.loads((tmp_path / "results.json").read_text())) == {str(run.folder) for run in runs}
    for name in ("sheet.png", "step_counts.png", "first_table.png"):
        assert len(np.unique(np.asarray(Image.open(tmp_path / name)).reshape(-1, 3), axis=0)) > 100


def test_quick_has_fewer_pictures_and_a_folder_of_its_own(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["experiment.py"])
    full = experiment_module.parse_args()
    monkeypatch.setattr(sys, "argv", ["experiment.py", "--quick"])
    quick = experiment_module.parse_args()
    assert full.output_dir != quick.output_dir and quick.eval_count < full.eval_count and quick.num_workers == 1
    monkeypatch.setattr(sys, "argv", ["experiment.py", "--quick", "--eval_count", "20", "--output_dir", "here"])
    given = experiment_module.parse_args()
    assert (given.eval_count, str(given.output_dir)) == (20, "here")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "nowhere"], "--model nowhere: holds no pipeline"),
        (["--eval_count", "8"], "--eval_count 8: give 16 or more"),
        (["--output_dir", "a_file"], "--output_dir a_file: File exists; choose another folder"),
    ],
)
def test_bad_flags_end_in_one_line(tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    Path("a_file").touch()
    monkeypatch.setattr(sys, "argv", ["experiment.py", *flags])
    with pytest.raises(SystemExit, match=message):
        experiment_module.main()


def test_the_miniature_is_not_made_from_another_ones_parts(tmp_path, monkeypatch):
    flags = ["--work_dir", str(tmp_path / "work"), "--output_dir", str(tmp_path / "model")]
    (tmp_path / "work").mkdir()
    check_settings(tmp_path / "work" / "settings.json", {"seed": 0}, origin="")
    monkeypatch.setattr(sys, "argv", ["make.py", *flags, "--seed", "1"])
    with pytest.raises(SystemExit, match="--work_dir .* another seed \\(0, now 1\\)"):
        make.main()


@pytest.mark.parametrize(
    ("wanted", "trained"), [(0, {"steps": 2, "reached": True}), (2, {"steps": 3, "reached": False})]
)
def test_a_baseline_stops_at_an_accuracy_or_says_that_it_did_not_get_there(tmp_path, wanted, trained):
    experiment = Experiment.open(MODEL, tmp_path, 3, 2, 24)  # three steps, a look after the second
    dopsd, stopped = (Run(CONCEPTS[0], 0, method) for method in (DOPSD, SFT_STOPPED))
    (tmp_path / dopsd.folder).mkdir(parents=True)
    (tmp_path / dopsd.folder / "result.json").write_text(json.dumps({"new": {"exact": wanted}}))
    assert experiment.train_baseline(stopped) == trained


@pytest.mark.slow
def test_a_failed_training_ends_the_experiment_in_one_line(tmp_path):
    run = Run(CONCEPTS[0], 0, Method("broken", flags={"rank": 0}))
    experiment = Experiment.open(MODEL, tmp_path, 12, 10, 24)
    with pytest.raises(RuntimeError, match="training.log: the training script ended with"):
        run_side_by_side(experiment, [run], [], 1)
    assert "--rank" in (tmp_path / run.folder / "training.log").read_text()
