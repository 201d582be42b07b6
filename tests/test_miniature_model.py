"""The shipped miniature: what it is, what it can, and the experiment on it from end to end."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import Flux2KleinPipeline
from PIL import Image

import world
from concepts import CONCEPTS
from exam import standard_tasks
from experiment import (
    DOPSD,
    FIRST_TABLE,
    REPOSITORY,
    SFT,
    SFT_STOPPED,
    Experiment,
    Method,
    Run,
    check_settings,
    run_side_by_side,
    runs_of,
)
from metrics import PictureReader
from parts import MAX_SEQUENCE_LENGTH, make_text_encoder, make_tokenizer
from quickstart import MODEL
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
    settings = (MODEL, tmp_path, 12, 24)  # steps of every run, pictures of each kind
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
    # 12 steps teach nothing: D-OPSD's accuracy is 0, which SFT has at its first look.
    result = experiment.result(dopsd)
    if result["new"]["exact"] == 0:
        assert experiment.result(stopped)["steps"] == 10 and experiment.result(stopped)["reached"]
    assert result["retention"] == pytest.approx(result["retention_logged"], abs=1e-3) and result["retention"] > 0

    check_settings(experiment)
    with pytest.raises(ValueError, match="--output_dir .* another num_train_steps \\(12, now 13\\)"):
        check_settings(replace(experiment, num_train_steps=13))

    write(experiment, first, {}, {"D-OPSD": step_runs})
    text = (tmp_path / "results.md").read_text()
    assert text.count("| D-OPSD |") == 6  # in the table, in the concept's, and for each number of sampling steps
    assert set(json.loads((tmp_path / "results.json").read_text())) == {str(run.folder) for run in runs}
    for name in ("sheet.png", "step_counts.png", "first_table.png"):
        assert len(np.unique(np.asarray(Image.open(tmp_path / name)).reshape(-1, 3), axis=0)) > 100


@pytest.mark.slow
def test_a_failed_training_ends_the_experiment_in_one_line(tmp_path):
    run = Run(CONCEPTS[0], 0, Method("broken", flags={"rank": 0}))
    experiment = Experiment.open(MODEL, tmp_path, 12, 24)
    with pytest.raises(RuntimeError, match="training.log: the training script ended with"):
        run_side_by_side(experiment, [run], [], 1)
    assert "--rank" in (tmp_path / run.folder / "training.log").read_text()
