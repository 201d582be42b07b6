"""The exam's averages, verdicts, table, file and progress, for figures that were written by hand."""

import json
from dataclasses import replace

import pytest

from dopsd.errors import OutputError
from dopsd.exam.alignment import Alignment
from dopsd.exam.figures import ANYWHERE, FEATURES, IN_PLACE, Figures, Row
from dopsd.exam.results import Exam, lead
from dopsd.exam.store import EXAM_FILE, read_exam, write_exam
from dopsd.exam.student import in_words, progress, student_figures
from dopsd.exam.table import as_text, columns
from dopsd.exam.verdict import (
    BLURS,
    COPIES,
    EDITS,
    MISSES,
    NO_BETTER,
    NO_FURTHER,
    TEACHES,
    ZOOMS,
    findings,
    percent,
    stop_line,
    verdict,
)


NOWHERE = Alignment(1.3, 0.4, -0.4, quality=0.3)
# The least and the most that the teacher's figures change between rows.
JITTER = (-0.02, 0.01, 0.0, 0.01)


def figures(anywhere: float, *, in_place: float = 1.0, **changed) -> Figures:
    defaults = {"sharpness": 1.0, "alignment": NOWHERE, "background": None}
    return Figures(distances={IN_PLACE: in_place, ANYWHERE: anywhere}, **defaults | changed)


def exam(teacher: float = 0.5, *, change: float = 0.7, base: Figures | None = None, **changed) -> Exam:
    """Four rows, of which the base is 1.0 away from the picture, and the teacher about `teacher`."""
    base = base or figures(1.0)
    rows = [
        Row(f"row {number}", base, figures(teacher + jitter, **changed), picture_sharpness=1.0, change=change)
        for number, jitter in enumerate(JITTER)
    ]
    return Exam(tuple(rows))


def at(scale: float = 1.0, right: float = 0.0, down: float = 0.0) -> Alignment:
    return Alignment(scale, right, down, quality=0.9)


def with_alignments(*alignments: Alignment, **options) -> Exam:
    rows = [
        replace(row, teacher=replace(row.teacher, alignment=one))
        for row, one in zip(exam(**options).rows, alignments, strict=True)
    ]
    return Exam(tuple(rows))


# Averages


def test_a_lead_is_the_mean_over_rows_with_its_standard_error():
    found = lead([1.0, 3.0], [0.5, 2.5])
    assert found.value == pytest.approx(0.25) and found.error == pytest.approx(0.03 / 2**0.5)  # the least deviation
    assert lead([2.0, 2.0], [1.0, 2.0]).error == pytest.approx(0.25)
    assert lead([1.0], [1.0]).at_most == pytest.approx(0.5)  # of a single row, nothing is sure
    assert lead([0.0], [0.0]).value == 0


def test_the_background_that_is_copied_is_relative_to_what_the_base_shows():
    assert exam(background=0.9, base=figures(1.0, background=0.8)).copied_background == pytest.approx(0.5)
    assert exam(background=0.7, base=figures(1.0, background=0.8)).copied_background == pytest.approx(-0.5)
    assert exam(background=1.0, base=figures(1.0, background=0.99)).copied_background is None  # the caption gives it
    assert exam().copied_background is None


# Verdicts


def test_a_teacher_with_a_lead_teaches():
    assert verdict(exam(0.5)) == TEACHES and stop_line(exam(0.5), "--teacher_context edit") is None
    assert "50 % closer" in str(findings(exam(0.5))[0])


def test_a_subject_that_is_drawn_elsewhere_is_taught():
    elsewhere = with_alignments(at(right=0.2), at(down=0.3), at(right=-0.2), at(right=-0.2, down=0.2), in_place=1.1)
    assert verdict(elsewhere) == TEACHES and stop_line(elsewhere, "") is None


def test_a_teacher_that_draws_as_the_base_does_stops_the_run():
    line = stop_line(exam(1.0, change=0.05), "--teacher_context edit")
    assert line.startswith(
        "--teacher_context edit: the teacher is no better than the base (it draws what the base draws; "
    )
    assert line.endswith("or pass --ignore_exam to train all the same") and "\n" not in line
    assert verdict(exam(1.0, change=0.05)) == NO_BETTER


def test_a_small_change_that_brings_the_subject_is_no_reason_to_stop():
    assert stop_line(exam(0.7, change=0.1), "") is None and verdict(exam(0.7, change=0.1)) == TEACHES
    assert stop_line(exam(0.9, change=0.1), "") is None


def test_a_teacher_that_is_further_away_in_every_row_stops_the_run():
    assert stop_line(exam(1.1), "") and verdict(exam(1.1)) == NO_BETTER
    assert "10 % further" in stop_line(exam(1.1), "")


def test_rows_that_disagree_are_no_reason_to_stop():
    rows = [replace(row, teacher=figures(value)) for row, value in zip(exam().rows, (0.8, 1.3, 0.9, 1.1), strict=True)]
    assert verdict(Exam(tuple(rows))) == NO_BETTER and stop_line(Exam(tuple(rows)), "") is None
    assert "too close for certainty" in str(findings(Exam(tuple(rows)))[0])
    assert stop_line(Exam(exam(1.1).rows[:1]), "") is None  # one row alone


def test_one_measure_with_a_lead_is_enough():
    def with_features(teacher: float) -> Exam:
        rows = []
        for row in exam(1.1).rows:
            distances = [one.distances | {FEATURES: value} for one, value in ((row.base, 1.0), (row.teacher, teacher))]
            parts = zip((row.base, row.teacher), distances, strict=True)
            base, taught = (replace(one, distances=distance) for one, distance in parts)
            rows.append(replace(row, base=base, teacher=taught))
        return Exam(tuple(rows), exam_model="dino")

    assert verdict(with_features(0.6)) == TEACHES and stop_line(with_features(0.6), "") is None
    assert verdict(with_features(1.1)) == NO_BETTER and stop_line(with_features(1.1), "")
    assert with_features(0.6).leads[FEATURES].value == pytest.approx(0.4)


def test_a_teacher_without_a_picture_is_stopped_only_if_it_changes_nothing():
    assert stop_line(replace(exam(1.1), saw_picture=False), "") is None
    line = stop_line(replace(exam(1.0, change=0.0), saw_picture=False), "--teacher_context caption")
    assert "make the teacher's captions say more" in line


def test_blur_is_measured_against_the_softer_of_base_and_picture():
    assert verdict(exam(sharpness=0.6)) == BLURS and "60 %" in str(findings(exam(sharpness=0.6))[0])
    assert verdict(exam(sharpness=0.6, base=figures(1.0, sharpness=0.65))) == TEACHES
    soft_pictures = [replace(row, picture_sharpness=0.62) for row in exam(sharpness=0.6).rows]
    assert verdict(Exam(tuple(soft_pictures))) == TEACHES
    assert [finding.verdict for finding in findings(exam(1.1, sharpness=0.5))] == [BLURS, NO_BETTER]


def test_a_zoom_that_most_rows_share():
    zoomed = with_alignments(at(1.1), at(1.12), at(1.08), NOWHERE)
    assert verdict(zoomed) == ZOOMS and "x1.10" in str(findings(zoomed)[0])
    assert verdict(with_alignments(at(1.1), at(0.9), at(1.1), at(1.0))) == TEACHES
    assert verdict(with_alignments(at(1.1), at(1.1), NOWHERE, NOWHERE)) == TEACHES
    assert verdict(with_alignments(at(0.9), at(0.9), at(0.88), at(0.92))) == ZOOMS


def test_a_zoom_that_the_base_has_too_is_not_the_teachers():
    base = figures(1.0, alignment=at(1.1))
    assert verdict(with_alignments(*[at(1.1)] * 4, base=base)) == TEACHES
    assert verdict(with_alignments(*[at(1.2)] * 4, base=base)) == ZOOMS


def test_a_shift_that_most_rows_share():
    shifted = with_alignments(at(right=0.06), at(right=0.07), at(right=0.05), NOWHERE)
    assert verdict(shifted) == ZOOMS and "6 % to the right" in str(findings(shifted)[0])
    assert verdict(with_alignments(at(right=0.1), at(right=0.3), at(right=0.2), at(right=0.4))) == TEACHES


def test_a_copy_stays_in_its_place_in_most_rows():
    copies = with_alignments(at(), at(1.01), at(right=0.01), NOWHERE)
    assert verdict(copies) == COPIES
    assert "take a --teacher_prompt_suffix that asks for the subject only" in str(findings(copies)[0])
    assert verdict(with_alignments(at(), at(), NOWHERE, NOWHERE)) == TEACHES
    assert verdict(with_alignments(*[at()] * 4, base=figures(1.0, alignment=at()))) == TEACHES  # so does the base


def test_a_copy_of_another_picture_is_no_reason_to_stop():
    """Its background is not the training picture's, so it is further from that than the base."""
    copies = replace(with_alignments(*[at()] * 4, teacher=1.3), saw_other=True)
    assert verdict(copies) == COPIES and len(findings(copies)) == 1 and stop_line(copies, "") is None
    zoomed = with_alignments(*[at(1.2)] * 4, teacher=1.3)
    assert verdict(zoomed) == ZOOMS and len(findings(zoomed)) == 1 and stop_line(zoomed, "") is None


def test_an_editor_reproduces_the_picture():
    copies = replace(with_alignments(*[at()] * 4, background=0.97), is_editor=True)
    assert str(findings(copies)[0]).endswith("; go ahead") and verdict(copies) == EDITS
    assert stop_line(copies, "") is None
    assert stop_line(replace(exam(1.0, in_place=0.6), is_editor=True), "") is None  # latents in place count, too


def test_an_editor_that_spoils_the_background_or_draws_something_else_is_not_told_to_go_ahead():
    grey = replace(with_alignments(*[at()] * 4, background=0.01), is_editor=True)
    assert verdict(grey) == MISSES and "shows 1 % of the result's background); look at preview.png" in str(
        findings(grey)[0]
    )
    nearly = [at(), at(), replace(at(), quality=0.7), replace(at(), quality=0.7)]
    other_shape = replace(with_alignments(*nearly, background=1.0), is_editor=True)
    assert verdict(other_shape) == MISSES and "2 of 4 drawings are nearly the result" in str(findings(other_shape)[0])
    assert verdict(replace(grey, is_editor=False)) == COPIES
    zoomed = replace(with_alignments(*[at(1.2)] * 4, background=0.5), is_editor=True)
    assert [finding.verdict for finding in findings(zoomed)] == [ZOOMS]
    assert "change --teacher_prompt_suffix" in str(findings(grey)[0])
    assert "make the teacher's captions say more" in str(findings(replace(grey, saw_picture=False))[0])


def test_a_teacher_that_sees_through_a_tower_is_not_stopped_for_its_latents():
    far = replace(exam(1.1), saw_by_tower=True)
    assert verdict(far) == NO_BETTER and stop_line(far, "") is None and stop_line(exam(1.1), "")
    assert stop_line(replace(exam(1.0, change=0.05), saw_by_tower=True), "")  # draws what the base draws
    rows = [replace(row, base=wide(row.base), teacher=wide(row.teacher)) for row in exam(1.1).rows]
    assert stop_line(Exam(tuple(rows), saw_by_tower=True), "")  # the tower and a model see no lead either


def test_with_init_lora_the_teacher_is_compared_with_the_student_before_training():
    idle = replace(exam(1.0, change=0.05), from_lora=True)
    line = "no better than the student before training (it draws what the student before training draws"
    assert verdict(idle) == NO_FURTHER and line in stop_line(idle, "") and "the base" not in stop_line(idle, "")
    assert "50 % closer to the pictures than the student before training" in str(
        findings(replace(exam(0.5), from_lora=True))[0]
    )
    assert "\nstudent before " in as_text(idle) and "\nthe base " in as_text(exam())
    assert in_words({"student/sharpness": 1.0}, from_lora=True) == (
        "Sharpness 100 % of the student's before training."
    )


def test_the_stop_line_has_the_reason_of_the_verdict():
    for idle in (exam(1.0, change=0.05), exam(1.1)):
        assert findings(idle)[0].reason in stop_line(idle, "") and findings(idle)[0].advice in stop_line(idle, "")


# Table


def test_no_figure_is_minus_zero():
    assert percent(-0.004) == "0 %" and percent(-0.1) == "-10 %"
    assert in_words({"progress": -0.4, "student/sharpness": 1.0}).startswith("Progress: 0 % of")
    assert "-0 %" not in as_text(exam(1.003, background=0.799, base=figures(1.0, background=0.8)))


def test_a_shift_that_the_rows_do_not_share_has_no_average():
    def average(*alignments: Alignment) -> list[str]:
        return as_text(with_alignments(*alignments)).splitlines()[5].split()

    assert "+6" in average(at(right=0.06), at(right=0.06), at(right=0.06), at(right=0.05))
    apart = average(at(right=0.2), at(right=-0.2), at(down=0.3), at(down=-0.1))
    assert apart[-3:] == ["x1.00", "-", "-"]  # zoom, shift, background


def test_the_tables_sharpness_is_the_one_that_decides():
    soft_base = exam(sharpness=0.6, base=figures(1.0, sharpness=0.5))
    soft_picture = Exam(tuple(replace(row, picture_sharpness=0.75) for row in exam(sharpness=0.6).rows))
    assert " 120 % " in as_text(soft_base).splitlines()[5]
    rows = as_text(soft_picture).splitlines()
    assert " 80 % " in rows[1] and " 80 % " in rows[5] and " 133 % " in rows[6]


def test_the_table_fits_a_terminal():
    rows = [
        replace(row, caption=text) for row, text in zip(exam().rows, ["长" * 90, "b" * 90, "c\nd", ""], strict=True)
    ]
    lines = as_text(Exam(tuple(rows))).splitlines()
    table = lines[: len(rows) + 3]
    assert {columns(line) for line in table} == {columns(table[0])} and columns(table[0]) <= 100
    assert lines[-1].startswith("Verdict: teaches the subject (50 % closer")
    assert "+52 %" in table[1] and "+50 %" in table[5] and table[5].startswith("average")
    every = Exam(tuple(replace(row, base=wide(row.base), teacher=wide(row.teacher)) for row in rows))
    assert columns(as_text(every).splitlines()[0]) <= 100


def wide(one: Figures) -> Figures:
    return replace(one, distances=one.distances | {"tower": 1.0, FEATURES: 1.0}, alignment=at(1.2, -0.3, 0.3))


def test_every_finding_is_printed():
    assert as_text(exam(1.1, sharpness=0.5)).splitlines()[-1].startswith("Also: no better than the base (10 % further")


# File


def test_an_exam_is_written_and_read(tmp_path):
    written = replace(with_alignments(*[at()] * 4, background=0.5), saw_other=True, exam_model="dino")
    written = replace(written, saw_by_tower=True, from_lora=True, num_inference_steps=4)
    write_exam(written, tmp_path)
    assert read_exam(tmp_path) == written
    content = json.loads((tmp_path / EXAM_FILE).read_text())
    assert content["verdict"] == COPIES and content["average"]["leads"][ANYWHERE]["value"] == pytest.approx(0.5)


def test_a_missing_or_damaged_exam_is_said_to_be_one(tmp_path, caplog):
    assert read_exam(tmp_path) is None and "exam.json: is missing, so the student's progress" in caplog.text
    write_exam(exam(), tmp_path)
    complete = (tmp_path / EXAM_FILE).read_text()
    damaged = ["", "[]", "{}", "null", complete[:200], complete.replace("1.0", "NaN"), complete.replace("1.0", '"1"')]
    damaged += [complete.replace('"anywhere"', '"elsewhere"', 3), complete.replace('"scale"', '"size"'), "[" * 9000]
    damaged.append(json.dumps(json.loads(complete) | {"rows": []}))
    for content in damaged:
        caplog.clear()
        (tmp_path / EXAM_FILE).write_text(content)
        assert read_exam(tmp_path) is None, content
        assert "exam.json: is damaged (" in caplog.text and len(caplog.text.splitlines()) == 1


def test_an_exam_that_cannot_be_written_names_its_file(tmp_path):
    (tmp_path / EXAM_FILE).mkdir()
    with pytest.raises(OutputError, match="exam.json could not be written"):
        write_exam(exam(), tmp_path)


# Progress


def test_progress_is_a_percentage_of_the_teachers_lead():
    held = exam(0.5, in_place=0.8)
    assert progress(held, [row.base for row in held.rows]) == {
        "progress": 0,
        f"progress/{IN_PLACE}": 0,
        f"progress/{ANYWHERE}": 0,
    }
    done = progress(held, [row.teacher for row in held.rows])
    assert done == {name: pytest.approx(100) for name in done}
    half = progress(held, [figures(0.75, in_place=0.95)] * 4)
    assert half["progress"] == half[f"progress/{ANYWHERE}"] == pytest.approx(50)
    assert half[f"progress/{IN_PLACE}"] == pytest.approx(25)
    assert progress(held, [figures(0.25)] * 4)["progress"] == pytest.approx(150)
    assert progress(held, [figures(1.5)] * 4)["progress"] == pytest.approx(-100)


def test_without_a_lead_there_is_no_progress():
    assert progress(exam(1.0), [figures(0.5)] * 4) == {}


def test_the_headline_is_a_measure_that_decides():
    half = [figures(0.75, in_place=0.7)] * 4
    in_place_only = exam(1.0, in_place=0.5)
    assert progress(in_place_only, half) == {f"progress/{IN_PLACE}": pytest.approx(60)}
    assert "Progress" not in in_words(student_figures(in_place_only, half))
    assert progress(replace(in_place_only, is_editor=True), half)["progress"] == pytest.approx(60)
    both = progress(exam(0.5, in_place=0.2), half)  # leads by more in place
    assert both["progress"] == both[f"progress/{ANYWHERE}"] == pytest.approx(50) and f"progress/{IN_PLACE}" in both
