import json
import sys

import pytest
from PIL import Image

from benchmarks.miniature import domain_report, teach_domain
from benchmarks.miniature.domain_runs import RATES, RECIPES
from benchmarks.miniature.files import MODEL
from benchmarks.miniature.lesson_runs import LessonExperiment
from dopsd.errors import InputError


@pytest.fixture
def teach(tmp_path, monkeypatch):
    """Runs the command without training or drawing anything. Returns the waves of runs that it asks for."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # `main` changes it; this restores it
    figures = {
        "exact": 1.0,
        "whole": 0.5,
        "ordinary": 0.75,
        "look": 0.25,
        "latent_fd": 0.12,
        "detail": 1,
        "residual": 2,
    }
    waves = []
    monkeypatch.setattr(teach_domain, "assemble_base", lambda folder: MODEL)
    monkeypatch.setattr(teach_domain, "run_side_by_side", lambda experiment, work, workers: waves.append(work.runs))
    result = {"new": figures, "old": figures, "wrong_words": figures, "steps": 3}
    monkeypatch.setattr(LessonExperiment, "result", lambda self, run: result)
    monkeypatch.setattr(domain_report, "draw_sheet", lambda *args: Image.new("RGB", (8, 8)))

    def run(*arguments) -> list[list]:
        monkeypatch.setattr(
            sys, "argv", ["teach_domain.py", "--output_dir", str(tmp_path / "out"), *map(str, arguments)]
        )
        teach_domain.main()
        return waves

    return run


def test_the_grid_is_trained_first_and_all_runs_are_kept_in_the_results(teach, tmp_path):
    grid, compared = teach("--seeds", 0, 1)
    assert len(grid) == len(RECIPES) * sum(map(len, RATES.values()))
    assert {run.seed for run in grid} == {3} and {run.seed for run in compared} == {0, 1}
    results = json.loads((tmp_path / "out" / "domain.json").read_text())
    assert set(results) == {str(run.folder) for run in (*grid, *compared)}
    text = (tmp_path / "out" / "domain.md").read_text()
    assert text.count("| SFT, whole model | 3 | 0.50 ± 0.00 | 0.25 ± 0.00 |") == text.count("| SFT, LoRA | 3 |") == 1
    assert text.count("**0.50 / 0.75 / 0.25 / 0.12**") == 2 * len(RECIPES) and "seeds 0, 1." in text
    assert (tmp_path / "out" / "domain.png").exists()


def test_one_mode_can_be_chosen_and_settings_are_kept(teach):
    grid, _ = teach("--only", "full")
    assert all(run.method.is_full for run in grid)
    with pytest.raises(InputError, match="--output_dir .* another num_train_steps"):
        teach("--num_train_steps", 5)
    with pytest.raises(InputError, match="--eval_count 8: give 16 to 192"):
        teach("--eval_count", 8)
