"""exam.json: the exam beside preview.png, from which a resumed run reads the figures of base and teacher."""

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate.logging import get_logger

from ..errors import first_line
from ..files import read_regular_file
from ..output import naming_file, replacing
from .alignment import Alignment
from .figures import Figures, Row
from .results import Exam
from .verdict import findings


logger = get_logger(__name__)

EXAM_FILE = "exam.json"
MAX_BYTES = 1_000_000


def write_exam(exam: Exam, folder: Path) -> None:
    """Raises `OutputError` if exam.json cannot be written."""
    motion = exam.motion("teacher")
    content = {
        "verdict": findings(exam)[0].verdict,
        "findings": [asdict(finding) for finding in findings(exam)],
        "average": {
            "leads": {name: asdict(lead) for name, lead in exam.leads.items()},
            "sharpness": exam.sharpness_kept,
            "motion": None if motion is None else asdict(motion),
            "background": exam.copied_background,
        },
        **asdict(exam),
    }
    path = folder / EXAM_FILE
    with naming_file(path), replacing(path) as unfinished:
        unfinished.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def read_exam(folder: Path) -> Exam | None:
    """The exam of a run that is resumed; None, with a warning, if its file is missing or damaged."""
    path = folder / EXAM_FILE
    try:
        return parse_exam(json.loads(read_regular_file(path, MAX_BYTES)))
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        problem = "is missing" if isinstance(error, FileNotFoundError) else f"is damaged ({first_line(error)})"
        logger.warning(f"{path}: {problem}, so the student's progress is not measured")
        return None


def parse_exam(content: Any) -> Exam:
    """Raises ValueError, TypeError, LookupError or AttributeError if it is not what `write_exam` writes."""
    rows = tuple(
        Row(
            caption=str(row["caption"]),
            base=parse_figures(row["base"]),
            teacher=parse_figures(row["teacher"]),
            picture_sharpness=number(row["picture_sharpness"]),
            change=number(row["change"]),
        )
        for row in content["rows"]
    )
    measures = {frozenset(figures.distances) for row in rows for figures in (row.base, row.teacher)}
    if len(measures) != 1 or not min(measures):
        raise ValueError("its rows have no measures in common")
    model, steps = content["exam_model"], content["num_inference_steps"]
    return Exam(
        rows=rows,
        is_editor=bool(content["is_editor"]),
        saw_other=bool(content["saw_other"]),
        saw_picture=bool(content["saw_picture"]),
        saw_by_tower=bool(content["saw_by_tower"]),
        from_lora=bool(content["from_lora"]),
        num_inference_steps=None if steps is None else int(number(steps)),
        exam_model=None if model is None else str(model),
    )


def parse_figures(content: dict) -> Figures:
    background = content["background"]
    return Figures(
        distances={str(name): number(value) for name, value in content["distances"].items()},
        sharpness=number(content["sharpness"]),
        alignment=Alignment(**{name: number(value) for name, value in content["alignment"].items()}),
        background=None if background is None else number(background),
    )


def number(value: Any) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ValueError(f"{value!r} is not a number")
    return float(value)
