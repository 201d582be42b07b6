"""The shipped editor: what stock diffusers draws with it."""

import sys

import numpy as np
import pytest
import torch
from diffusers import Flux2KleinPipeline

from benchmarks.miniature import editor, world
from benchmarks.miniature.edit_tasks import copy_task, editor_tasks, measure_placed
from benchmarks.miniature.editor import WEIGHTS
from benchmarks.miniature.files import MODEL
from benchmarks.miniature.parts import MAX_SEQUENCE_LENGTH, NUM_STEPS
from benchmarks.miniature.tasks import reference_columns


NUM_PICTURES = 8


@pytest.fixture(scope="module")
def stock_editor(editor_folder):
    pipeline = Flux2KleinPipeline.from_pretrained(editor_folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_it_is_small_and_differs_from_the_miniature_in_its_transformer_only(editor_folder, stock_editor):
    assert WEIGHTS.stat().st_size < 4.2e6
    files = {path.relative_to(MODEL) for path in MODEL.rglob("*") if path.is_file()}
    assert files == {path.relative_to(editor_folder) for path in editor_folder.rglob("*") if path.is_file()}
    changed = {name for name in files if (MODEL / name).read_bytes() != (editor_folder / name).read_bytes()}
    assert {str(name) for name in changed} == {"transformer/diffusion_pytorch_model.safetensors"}
    assert stock_editor.transformer.dtype == torch.float32


def test_the_command_writes_it_over_an_earlier_one_and_measures_it(tmp_path, monkeypatch, capsys, reader):
    monkeypatch.setattr(editor, "editor_tasks", lambda count: {"copy": copy_task(count, seed=0)})
    monkeypatch.setattr(editor, "PictureReader", lambda appearances: reader)
    monkeypatch.setattr(sys, "argv", ["editor.py", "--output_dir", str(tmp_path / "editor"), "--count", "3"])
    for _ in range(2):
        editor.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == lines[3] == "| | exact | background | place | residual | detail | poses |"
    assert lines[2].startswith("| copy | 1.0 | 1.0 | 1.0 | ") and lines[2] == lines[5]


@pytest.mark.parametrize("kind", ["edit_seen", "pair_nonsense", "copy"])
def test_stock_diffusers_draws_what_is_asked_for(stock_editor, reader, kind):
    task = editor_tasks(NUM_PICTURES)[kind]
    pictures = []
    for seed, prompt in enumerate(task.prompts):
        images = [column[seed] for column in reference_columns(task.references)]
        picture = stock_editor(
            prompt=prompt,
            image=images or None,
            height=world.SIDE,
            width=world.SIDE,
            num_inference_steps=NUM_STEPS,
            guidance_scale=1.0,
            generator=torch.Generator().manual_seed(seed),
            max_sequence_length=MAX_SEQUENCE_LENGTH,
            output_type="np",
        ).images[0]
        pictures.append(np.float32(2 * picture - 1))
    figures = measure_placed(world.to_tensor(pictures), task, reader)
    assert figures["exact"] >= 0.8 and figures["background"] >= 0.9 and figures.get("place", 1) >= 0.9
