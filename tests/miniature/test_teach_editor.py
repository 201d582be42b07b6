import json
import sys

import pytest
from PIL import Image

from benchmarks.miniature import teach_editor
from benchmarks.miniature.lesson_runs import EDIT_METHODS, LEAK_METHODS, LessonExperiment
from benchmarks.miniature.lessons import EDIT_LESSONS, LEAK_LESSONS
from dopsd.errors import InputError


@pytest.fixture
def teach(tmp_path, monkeypatch):
    """Runs the command without training or drawing anything. Returns the runs that it asks for."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # `main` changes it; this restores it
    figures = {"new": {"exact": 0.5, "trained_places": 0.25}, "steps": 3}
    asked = []
    monkeypatch.setattr(teach_editor, "run_side_by_side", lambda experiment, work, workers: asked.extend(work.runs))
    monkeypatch.setattr(LessonExperiment, "result", lambda self, run: figures)
    monkeypatch.setattr(LessonExperiment, "load", lambda self, run: None)
    for name in ("edit_sheet", "leak_sheet"):
        monkeypatch.setattr(teach_editor, name, lambda *args: Image.new("RGB", (8, 8)))

    def run(*arguments) -> list:
        monkeypatch.setattr(
            sys, "argv", ["teach_editor.py", "--output_dir", str(tmp_path / "out"), *map(str, arguments)]
        )
        teach_editor.main()
        return asked

    return run


def test_every_lesson_gets_a_table_and_a_sheet(teach, tmp_path):
    runs = teach("--seeds", 0, 1)
    num_trained = 2 * len(EDIT_LESSONS) * (len(EDIT_METHODS) - 1) + 2 * len(LEAK_LESSONS) * (len(LEAK_METHODS) - 1)
    assert len(runs) == num_trained + len(EDIT_LESSONS) + len(LEAK_LESSONS)  # the base has no seeds
    assert set(json.loads((tmp_path / "out" / "editor.json").read_text())) == {str(run.folder) for run in runs}
    text = (tmp_path / "out" / "editor.md").read_text()
    assert text.count("| SFT | 3 | 0.50 ± 0.00 |") == text.count("| base | 3 | 0.50 |") == text.count("### Lesson ")
    assert text.count("### Lesson ") == len(EDIT_LESSONS) + len(LEAK_LESSONS) and text.count("seen: of prompts") == 1
    assert "seeds 0, 1." in text and "0.25 ± 0.00" in text
    names = {f"editor_{lesson.name}.png" for lesson in (*EDIT_LESSONS, *LEAK_LESSONS)}
    assert {path.name for path in (tmp_path / "out").glob("*.png")} == names


def test_one_kind_of_lesson_can_be_chosen_and_settings_are_kept(teach):
    assert {run.concept for run in teach("--only", "editing")} == {*EDIT_LESSONS}
    with pytest.raises(InputError, match="--output_dir .* another num_train_steps \\(120, now 5\\)"):
        teach("--num_train_steps", 5)
    with pytest.raises(InputError, match="--eval_count 8: give 16 to 192"):
        teach("--eval_count", 8)
