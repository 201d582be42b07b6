"""The quick start as its user runs it, with fewer steps."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import Flux2KleinPipeline
from PIL import Image

from exam import MODEL
from parts import MAX_SEQUENCE_LENGTH
from quickstart import clear


QUICKSTART = Path(__file__).resolve().parents[1] / "benchmarks" / "miniature" / "quickstart.py"


def run_quickstart(output_dir: Path, working_dir: Path) -> str:
    command = [sys.executable, str(QUICKSTART), "--output_dir", str(output_dir), "--max_train_steps", "10"]
    finished = subprocess.run(command, cwd=working_dir, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout


@pytest.mark.slow
def test_it_leaves_a_lora_and_a_picture_and_can_be_run_again(tmp_path):
    output_dir = tmp_path / "with a space"
    output_dir.mkdir()
    (output_dir / ".made-by-quickstart").touch()
    (output_dir / "left over").touch()
    printed = run_quickstart(output_dir, working_dir=tmp_path)
    assert not (output_dir / "left over").exists()

    sheet = np.asarray(Image.open(output_dir / "sheet.png"))
    assert sheet.shape[1] > 5 * 128 and sheet.shape[0] > 6 * 128  # five columns; three new and three old prompts
    assert len(np.unique(sheet.reshape(-1, 3), axis=0)) > 1000  # pictures, not a blank page

    pipeline = Flux2KleinPipeline.from_pretrained(MODEL)
    pipeline.set_progress_bar_config(disable=True)

    def draw() -> np.ndarray:
        return pipeline(
            prompt="a zofu on mint",
            height=64,
            width=64,
            num_inference_steps=4,
            guidance_scale=1.0,
            generator=torch.Generator().manual_seed(0),
            max_sequence_length=MAX_SEQUENCE_LENGTH,
            output_type="np",
        ).images[0]

    before = draw()
    pipeline.load_lora_weights(output_dir / "lora")
    assert np.abs(draw() - before).mean() > 0.01
    for path in ("lora/pytorch_lora_weights.safetensors", "sheet.png"):
        assert str(output_dir / path) in printed
    figures = {
        line.split()[0]: line.split()[1:] for line in printed.splitlines() if line.startswith(("base ", "teacher "))
    }
    assert float(figures["base"][0]) < 0.1 and float(figures["teacher"][0]) > 0.9  # right objects, new prompts
    assert float(figures["base"][2]) > 0.9 and float(figures["base"][3]) == 0  # right objects, old prompts; retention


def test_it_clears_no_folder_that_it_did_not_make(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(SystemExit, match="--output_dir"):
        clear(tmp_path)
    assert (tmp_path / "thesis.tex").exists()
