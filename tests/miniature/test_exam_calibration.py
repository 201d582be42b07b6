"""Teachers of known kind, their exams, and the tables of verdicts."""

import numpy as np
import pytest
from PIL import Image

from benchmarks.miniature.exam import Examined, by_rows, confusion, figures, mistakes, report
from benchmarks.miniature.exam_teachers import KINDS, examine, make_class, moved, subjects, zoomed
from benchmarks.miniature.world import SIDE
from dopsd.exam.verdict import NO_BETTER, TEACHES, VERDICTS, is_surely_no_better, verdict


KIND = {kind.name: kind for kind in KINDS}


@pytest.fixture
def school(miniature):
    concepts = subjects(2)
    return make_class(miniature, concepts[0], concepts[1], seed=0)


def test_subjects_differ_and_the_first_are_the_experiments():
    found = subjects(8)
    assert [concept.name for concept in found[:3]] == ["object", "texture", "two-colour"]
    assert len({concept.appearance for concept in found}) == len({concept.word for concept in found}) == 8
    assert all(concept.appearance.is_held_out for concept in found)


@pytest.mark.parametrize(
    "name",
    [
        "good, saw another picture",
        "words win over the picture",
        "pixels blurred",
        "zoomed by 1.2",
        "copies another picture",
    ],
)
def test_teachers_of_each_verdict_are_told_apart(school, name):
    exam = examine(KIND[name], school)
    assert verdict(exam) == KIND[name].expected
    assert is_surely_no_better(exam) == (KIND[name].expected == NO_BETTER)


def test_pictures_are_zoomed_and_moved_as_they_say():
    pixels = np.zeros((SIDE, SIDE, 3), np.uint8)
    pixels[28:36, 28:36] = 255
    image = Image.fromarray(pixels)
    widths = [(np.asarray(zoomed([image], scale)[0])[32, :, 0] > 127).sum() for scale in (0.5, 1, 1.5, 2)]
    assert widths == [4, 8, 12, 16]
    assert np.argwhere(np.asarray(moved([image], right=4, down=-2)[0])[..., 0])[0].tolist() == [26, 32]


def test_the_tables_count_verdicts_and_name_mistakes(school):
    exams = {name: examine(KIND[name], school) for name in ("good", "words win over the picture")}
    right = [Examined(KIND[name], "object", exam) for name, exam in exams.items()]
    wrong = Examined(KIND["good"], "texture", exams["words win over the picture"])
    table = confusion([*right, wrong])
    assert "| good | **1** | 1 | 1 |" in table and "| words win over the picture | | **1** | 1 |" in table.replace(
        "  ", " "
    )
    assert mistakes([*right, wrong]) == [f"- good, texture: {NO_BETTER} instead of {TEACHES}"] and not mistakes(right)
    assert "| good | " in figures(right) and len(by_rows({"Held out": right}).splitlines()) == 6
    assert report({"Calibration": right, "Held out": [wrong]})[0] == "## Calibration: 2 of 2 verdicts right"
    assert all(kind.expected in VERDICTS for kind in KINDS)
