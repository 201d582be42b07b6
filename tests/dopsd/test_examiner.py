"""The exam of a run: when it is taken, what it leaves, and when it stops the run."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from PIL import Image

from dopsd.errors import OutputError
from dopsd.exam import examiner as module
from dopsd.exam.examiner import Examiner, open_exam_model
from dopsd.exam.figures import ANYWHERE, FEATURES, IN_PLACE, TOWER, Trial
from dopsd.exam.pixels import as_tensor
from dopsd.exam.store import EXAM_FILE, read_exam, write_exam
from dopsd.exam.verdict import COPIES, NO_BETTER
from short_runs import default_settings


def pooled(images):
    return [torch.nn.functional.avg_pool2d(as_tensor(image), 4) for image in images]


class Tower:
    has_tower = True

    def picture_features(self, picture):
        return as_tensor(picture).mean((1, 2)) + 2


def make_examiner(folder: Path, *, teacher: tuple = (), sees_picture: bool = True, **flags) -> Examiner:
    contexts = SimpleNamespace(
        data=SimpleNamespace(is_editing=False),
        conditioning=SimpleNamespace(teacher_sees_picture=sees_picture, teacher=teacher),
    )
    settings = default_settings(output_dir=str(folder), teacher_context="edit", **flags)
    return Examiner(settings, contexts, pooled, torch.device("cpu"))


@pytest.fixture
def trials(make_picture):
    """The teacher copies its pictures."""
    pictures = [make_picture(number, 96, 64) for number in (1, 2)]
    base = make_picture(5, 96, 64).transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return [Trial("a ball", base, picture, picture, picture) for picture in pictures]


def as_the_base(trials: list[Trial]) -> list[Trial]:
    return [replace(trial, teacher=trial.base) for trial in trials]


def test_the_exam_is_printed_and_written(trials, tmp_path, caplog):
    examiner = make_examiner(tmp_path)
    assert examiner.verdict == ""
    with caplog.at_level("INFO"):
        examiner.examine([trials[0], None, trials[1]])
    assert "The teacher's exam:" in caplog.text and "+100 %" in caplog.text
    assert read_exam(tmp_path) == examiner.exam and len(examiner.exam.rows) == 2
    assert examiner.verdict.startswith(f"Verdict: {COPIES} (2 of 2 in the same place")
    assert examiner.refusal() is None


def test_without_pictures_there_is_no_exam_and_no_earlier_one_remains(tmp_path):
    (tmp_path / EXAM_FILE).write_text("an earlier run's")
    examiner = make_examiner(tmp_path)
    examiner.start()
    examiner.examine([None, None])
    assert not (tmp_path / EXAM_FILE).exists() and examiner.refusal() is None and examiner.verdict == ""


def test_an_exam_that_cannot_be_replaced_names_its_file(trials, tmp_path):
    (tmp_path / EXAM_FILE).mkdir()
    examiner = make_examiner(tmp_path)
    with pytest.raises(OutputError, match="exam.json could not be written"):
        examiner.examine(as_the_base(trials))
    assert examiner.refusal() is None  # an exam that fails stops no run
    with pytest.raises(OutputError, match="exam.json could not be written"):
        make_examiner(tmp_path).start()


def test_a_teacher_that_draws_as_the_base_is_refused_unless_the_exam_is_ignored(trials, tmp_path):
    refused = []
    for flags in ({}, {"ignore_exam": True}, {"preview_only": True}):
        examiner = make_examiner(tmp_path, **flags)
        examiner.examine(as_the_base(trials))
        assert examiner.verdict.startswith(f"Verdict: {NO_BETTER} (it draws what the base draws)")
        refused.append(examiner.refusal())
    assert refused[0].startswith("--teacher_context edit: the teacher is no better") and refused[1:] == [None, None]


def test_the_main_process_decides_for_all(tmp_path):
    other = make_examiner(tmp_path)  # has measured nothing
    with patch.object(module, "broadcast_object_list", lambda values: ["no better"]):
        assert other.refusal() == "no better"


def test_a_tower_is_asked_only_if_it_is_loaded(trials, tmp_path):
    for loaded in (True, False):
        examiner = make_examiner(tmp_path, teacher=(Tower(),), no_context_cache=loaded)
        examiner.examine(trials)
        assert examiner.exam.measures == [IN_PLACE, ANYWHERE, *([TOWER] if loaded else [])]
        for row in examiner.exam.rows:
            assert row.teacher.distances.get(TOWER, 0) == pytest.approx(0, abs=1e-9)


def test_the_students_progress_between_base_and_teacher(trials, tmp_path, caplog):
    examiner = make_examiner(tmp_path)
    examiner.examine(trials)
    examiner.examine_student([trial.base for trial in trials], trials)
    assert examiner.student["progress"] == pytest.approx(0)
    examiner.examine_student([trial.teacher for trial in trials], trials)
    assert examiner.student["progress"] == pytest.approx(100)
    assert examiner.student["student/zoom"] == pytest.approx(1, abs=0.01)
    assert examiner.standing.startswith("Progress: 100 % of the teacher's lead, sharpness ")
    examiner.examine_student([trials[0].base, trials[0].base], [trials[0], None])  # rows that were not examined
    assert examiner.student == {} and examiner.standing == ""


def test_a_resumed_run_compares_with_the_exam_before_its_first_step(trials, tmp_path):
    first = make_examiner(tmp_path)
    first.examine(trials)
    resumed = make_examiner(tmp_path)
    resumed.examine_student([trial.base for trial in trials], trials)
    assert resumed.student == {}
    resumed.resume()
    resumed.examine_student([trial.base for trial in trials], trials)
    assert resumed.exam == first.exam and resumed.student["progress"] == pytest.approx(0)


def test_a_resumed_run_with_another_number_of_steps_measures_no_progress(trials, tmp_path, caplog):
    make_examiner(tmp_path, num_inference_steps=4).examine(trials)
    resumed = make_examiner(tmp_path, num_inference_steps=2)
    resumed.resume()
    assert resumed.exam is None
    assert "--num_inference_steps 2: the teacher's exam was drawn in 4, so the student's progress" in caplog.text
    same = make_examiner(tmp_path, num_inference_steps=4)
    same.resume()
    assert same.exam is not None


def test_the_exam_knows_what_its_teacher_is_compared_with_and_how_it_sees(trials, tmp_path):
    examiner = make_examiner(tmp_path, teacher=(Tower(),), init_lora="a.safetensors")
    examiner.examine(as_the_base(trials))
    assert examiner.exam.from_lora and examiner.exam.saw_by_tower
    assert "no better than the student before training" in examiner.refusal()
    examiner.examine_student([trial.base for trial in trials], trials)
    assert "of the student's before training" in examiner.standing
    plain = make_examiner(tmp_path)
    plain.examine(trials)
    assert not plain.exam.from_lora and not plain.exam.saw_by_tower


def test_features_of_another_model_are_not_compared(trials, tmp_path, caplog):
    first = make_examiner(tmp_path)
    first.examine(trials)
    rows = []
    for row in first.exam.rows:
        both = [replace(one, distances=one.distances | {FEATURES: 1.0}) for one in (row.base, row.teacher)]
        rows.append(replace(row, base=both[0], teacher=both[1]))
    write_exam(replace(first.exam, rows=tuple(rows), exam_model="dino"), tmp_path)
    resumed = make_examiner(tmp_path)
    resumed.resume()
    assert resumed.exam.measures == [IN_PLACE, ANYWHERE]
    assert "--exam_model is missing: the teacher's exam was taken with dino, so features are not " in caplog.text


def test_the_exam_model_is_opened_only_for_runs_that_draw():
    assert open_exam_model(default_settings(exam_model="nothing", validation_steps=0)) is None
    assert open_exam_model(default_settings(exam_model="nothing", encode_only=True)) is None
    assert open_exam_model(default_settings()) is None
