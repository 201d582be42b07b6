"""The exam as a table, for the log and for report.html, and its figures as JSON."""

import unicodedata

from ..text import printable
from .figures import ANYWHERE, FEATURES, IN_PLACE, TOWER, Row
from .results import Exam, lead
from .verdict import findings, percent


CAPTION_WIDTH = 16
HEADINGS = {IN_PLACE: "in place", ANYWHERE: "anywhere", TOWER: "tower", FEATURES: "features"}
NOTE = (
    "In place, anywhere, tower, features: how much closer to the picture the teacher draws than the base, by latents "
    "in their place or wherever they are, by the vision tower, by --exam_model; 100 % is the picture itself. "
    "Sharpness: over the base's or the picture's, whichever is softer. Zoom and shift (right, down): what aligns it "
    "with the picture that the teacher saw. Background: how much of it is copied, beyond what the base shows. A dash: "
    "it cannot be told, or is not shared by the rows. With --init_lora, the student before training stands for the "
    "base."
)


def headings(exam: Exam) -> list[str]:
    return ["", *(HEADINGS[name] for name in exam.measures), "sharpness", "zoom", "shift", "background"]


def table_rows(exam: Exam) -> list[list[str]]:
    """The cells: a row for each picture, the average, and the base's zoom and shift."""
    rows = [row_cells(number, row, exam.measures) for number, row in enumerate(exam.rows, start=1)]
    average = [
        "average",
        *(signed(one.value) for one in exam.leads.values()),
        percent(exam.sharpness_kept),
        *motion_cells(exam, "teacher"),
        share(exam.copied_background),
    ]
    base = [
        "student before" if exam.from_lora else "the base",
        *("0 %" for _ in exam.measures),
        percent(exam.sharpness("base")),
        *motion_cells(exam, "base"),
        share(None),
    ]
    return [*rows, average, base]


def row_cells(number: int, row: Row, measures: list[str]) -> list[str]:
    alone = Exam((row,))
    return [
        f"{number} {cut(printable(row.caption))}",
        *(signed(lead([row.base.distances[name]], [row.teacher.distances[name]]).value) for name in measures),
        percent(alone.sharpness_kept),
        *motion_cells(alone, "teacher"),
        share(alone.copied_background),
    ]


def motion_cells(exam: Exam, who: str) -> list[str]:
    motion = exam.motion(who)
    if motion is None:
        return ["-", "-"]
    shift = f"{signed(motion.right)}, {signed(motion.down)}" if exam.shares_shift(who) else "-"
    return [f"x{motion.scale:.2f}", shift]


def signed(value: float) -> str:
    return f"{round(100 * value):+d} %"


def share(value: float | None) -> str:
    return "-" if value is None else percent(value)


def cut(text: str) -> str:
    """At most `CAPTION_WIDTH` columns of a terminal."""
    result = ""
    for char in text:
        if columns(result + char) > CAPTION_WIDTH - 1:
            return result + "…"
        result += char
    return result


def columns(text: str) -> int:
    """Columns that a terminal gives a text: Chinese and Japanese characters have two, combining ones none."""
    wide = sum(unicodedata.east_asian_width(char) in "WF" for char in text)
    return len(text) + wide - sum(unicodedata.combining(char) > 0 for char in text)


def as_text(exam: Exam) -> str:
    """The table, at most 100 columns wide, and below it what was found."""
    lines = [headings(exam), *table_rows(exam)]
    widths = [max(columns(line[place]) for line in lines) for place in range(len(lines[0]))]
    padded = [
        "  ".join(
            text + " " * (width - columns(text)) if place == 0 else " " * (width - columns(text)) + text
            for place, (text, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
    first, *others = findings(exam)
    return "\n".join([*padded, f"Verdict: {first}", *(f"Also: {other}" for other in others)])
