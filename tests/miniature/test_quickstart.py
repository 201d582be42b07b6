import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.miniature import quickstart
from benchmarks.miniature.architectures import ARCHITECTURES
from benchmarks.miniature.command_line import run
from benchmarks.miniature.files import REPOSITORY
from dopsd.errors import InputError
from stock_helpers import draw_miniature


@pytest.mark.slow
@pytest.mark.parametrize("model", ["klein", pytest.param("zimage", marks=pytest.mark.exhaustive)])
def test_it_leaves_a_lora_and_a_sheet_and_can_be_run_again(tmp_path, monkeypatch, capfd, model):
    architecture = ARCHITECTURES[model]
    output_dir = tmp_path / "with a space"
    output_dir.mkdir()
    (output_dir / ".made-by-quickstart").touch()
    (output_dir / "left over").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(quickstart, "NUM_THREADS", 1)
    monkeypatch.setattr(quickstart, "EVAL_COUNT", 16)
    arguments = ["quickstart.py", "--model", model, "--output_dir", "with a space", "--max_train_steps", "6"]
    monkeypatch.setattr(sys, "argv", arguments)
    quickstart.main()
    printed = capfd.readouterr().out
    assert not (output_dir / "left over").exists()

    sheet = np.asarray(Image.open(output_dir / "sheet.png"))
    assert sheet.shape[1] > 5 * 128 and sheet.shape[0] > 6 * 128  # five columns; three new and three old prompts
    assert len(np.unique(sheet.reshape(-1, 3), axis=0)) > 1000  # pictures, not a blank page

    pipeline = architecture.stock_pipeline_class.from_pretrained(architecture.folder)

    def draw() -> torch.Tensor:
        return draw_miniature(pipeline, architecture, [0], prompt="a zofu on mint")

    before = draw()
    pipeline.load_lora_weights(output_dir / "lora")
    assert (draw() - before).abs().mean() > 1e-3
    for path in ("lora/pytorch_lora_weights.safetensors", "sheet.png"):
        assert str(output_dir / path) in printed
    figures = {
        line.split()[0]: line.split()[1:] for line in printed.splitlines() if line.startswith(("base ", "teacher "))
    }
    assert float(figures["base"][0]) < 0.1 and float(figures["teacher"][0]) > 0.9  # right objects, new prompts
    old, like, wrong = map(float, figures["base"][2:])
    assert old > 0.9 and like > 0.9 and wrong < 0.1
    assert "--max_train_steps 6: too few to learn the object, so the comparison means nothing yet" in printed
    assert "--with_prior_preservation True" in printed and "--trigger_word zofu" in printed


def test_it_does_not_clear_a_folder_that_holds_something_else(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(InputError, match="--output_dir .* holds other files"):
        quickstart.clear(tmp_path)
    assert (tmp_path / "thesis.tex").exists()
    with pytest.raises(InputError, match="--output_dir .*thesis.tex: Not a directory"):
        quickstart.clear(tmp_path / "thesis.tex")


def test_a_users_mistake_ends_the_command_in_one_line(tmp_path, capsys):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(SystemExit, match="^--output_dir .* choose a new or empty folder$"):
        run(lambda: quickstart.clear(tmp_path))


def test_quickstart_sh_runs_in_the_users_folder_from_any_path(tmp_path):
    """The script itself, in a repository with a stand-in for the installation and for the quick start."""
    repository, folder = tmp_path / "a repository", tmp_path / "a folder"
    (repository / ".venv" / "bin").mkdir(parents=True)
    (repository / ".venv" / "bin" / "python").symlink_to(sys.executable)
    shutil.copy(REPOSITORY / "quickstart.sh", repository)
    (repository / "install.sh").write_text("echo installed")
    package = repository / "benchmarks" / "miniature"
    package.mkdir(parents=True)
    (package / "quickstart.py").write_text("import os, sys\nprint(os.getcwd(), sys.argv[1:])")
    (folder / "benchmarks").mkdir(parents=True)
    (folder / "benchmarks" / "__init__.py").touch()  # not to be imported instead
    printed = subprocess.run(
        ["bash", repository / "quickstart.sh", "--output_dir", "my output"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert printed.splitlines()[-2:] == ["installed", f"{folder} ['--output_dir', 'my output']"]
