"""The quick start as its user runs it, with fewer steps."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import Flux2KleinPipeline
from PIL import Image

from contact_sheet import sheet_size
from quickstart import clear


QUICKSTART = Path(__file__).resolve().parents[1] / "quickstart" / "quickstart.py"


def run_quickstart(output_dir: Path, working_dir: Path) -> str:
    command = [sys.executable, str(QUICKSTART), "--output_dir", str(output_dir), "--max_train_steps", "8"]
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

    sheet = Image.open(output_dir / "before_after.png")
    assert sheet.size == sheet_size(4)
    assert len(np.unique(np.asarray(sheet).reshape(-1, 3), axis=0)) > 1000  # photographs of noise, not a blank page

    pipeline = Flux2KleinPipeline.from_pretrained(output_dir / "tiny-klein")
    pipeline.set_progress_bar_config(disable=True)

    def draw() -> np.ndarray:
        return pipeline(
            prompt="a striped ball on grass",
            height=96,
            width=96,
            num_inference_steps=4,
            guidance_scale=1.0,
            generator=torch.Generator().manual_seed(0),
            max_sequence_length=192,
            output_type="np",
        ).images[0]

    before = draw()
    pipeline.load_lora_weights(output_dir / "lora")
    assert np.abs(draw() - before).mean() > 0.01
    for path in ("lora/pytorch_lora_weights.safetensors", "before_after.png"):
        assert str(output_dir / path) in printed
    mean = float(next(line for line in printed.splitlines() if line.endswith("  mean")).split()[0])
    assert mean < 0.9  # 1 before training


def test_it_clears_no_folder_that_it_did_not_make(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(SystemExit, match="--output_dir"):
        clear(tmp_path)
    assert (tmp_path / "thesis.tex").exists()
