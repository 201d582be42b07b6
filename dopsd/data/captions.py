"""Captions from `--instance_prompt`, and from the columns of a metadata file or data set."""

import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate.logging import get_logger

from ..errors import InputError
from ..settings import DataSettings
from ..text import text_problem
from .pictures import DatasetCell, Picture, PictureFile, is_picture


logger = get_logger(__name__)

MAX_NAMES_IN_MESSAGE = 8


@dataclass(frozen=True)
class CaptionColumns:
    """The columns of a table that hold captions.

    Attributes:
        student: columns with the student's captions. If there are none, `prompt` is the caption of every row.
        teacher: column with the teacher's captions, if it has captions of its own.
        prompt: `--instance_prompt`.
    """

    student: tuple[str, ...]
    teacher: str | None
    prompt: str | None

    @property
    def names(self) -> list[str]:
        """All of these columns, each one once."""
        return list(dict.fromkeys([*self.student, *([] if self.teacher is None else [self.teacher])]))

    def picture(
        self,
        row: Mapping[str, Any],
        *,
        place: str,
        source: Path | DatasetCell | None,
        name: str | None = None,
        cond_images: tuple[PictureFile, ...] = (),
        group: str = "",
    ) -> Picture:
        """The picture of a row, with its captions.

        Args:
            row: column -> value.
            place: the row in error messages, such as "metadata.jsonl line 3".
            source: the encoded picture, if there is one.
            name: the picture's name. Default: `place`.
            cond_images: the pictures to edit.
            group: the picture's group.

        Raises:
            InputError: a caption is missing, empty or not text.
        """
        captions = tuple(_caption(row, column, place) for column in self.student) or (self.prompt,)
        teacher_caption = None if self.teacher is None else _caption(row, self.teacher, place)
        return Picture(name or place, captions, source, teacher_caption, cond_images, group)


def find_caption_columns(
    columns: list[str],
    text_columns: list[str],
    table: str,
    settings: DataSettings,
    teacher_caption_column: str | None,
) -> CaptionColumns:
    """Chooses the caption columns of a metadata file or data set by the flags.

    Args:
        columns: all columns of the table.
        text_columns: those that messages propose for captions.
        table: the metadata file or data set in messages.

    Raises:
        InputError: a flag names a column that does not exist, or there are no captions.
    """
    choices = text_columns or columns
    if teacher_caption_column is not None:
        check_column("--teacher_caption_column", teacher_caption_column, columns, table, choices)
    for column in settings.caption_column or ():
        check_column("--caption_column", column, columns, table, choices)
    has_prompt = is_text(settings.instance_prompt)
    if settings.caption_column and has_prompt:
        logger.warning("--instance_prompt is not used: the captions come from --caption_column")
    elif has_prompt and text_columns:
        logger.warning(
            f"--instance_prompt is the caption of every picture in {table}; to use captions from a column, pass "
            f"--caption_column with one of {quoted(text_columns)}"
        )
    elif not settings.caption_column and not has_prompt:
        columns_advice = f"--caption_column with one or more of {quoted(text_columns)}, or " if text_columns else ""
        raise InputError(f"{table}: needs captions; pass {columns_advice}one --instance_prompt for all pictures")
    return CaptionColumns(tuple(settings.caption_column or ()), teacher_caption_column, settings.instance_prompt)


def check_column(flag: str, column: str, columns: list[str], table: str, choices: list[str] | None = None) -> None:
    """Raises `InputError` if a flag names a column that the table does not have.

    Args:
        choices: the columns that the message proposes. Default: all.
    """
    if column not in columns:
        raise InputError(f"{flag} {column}: {table} has no such column; choose one of {quoted(choices or columns)}")


def may_hold_captions(values: Iterable[Any]) -> bool:
    """Whether a column with these values may contain captions: text, but not the names of pictures."""
    values = [value for value in values if value is not None]
    texts = [value for value in values if isinstance(value, str)]
    return not values or (bool(texts) and not all(map(is_picture, texts)))


def _caption(row: Mapping[str, Any], column: str, place: str) -> str:
    value, place = row.get(column), f"{place}, column {column!r}"
    if not is_text(value):
        raise InputError(f"{place}: expected a caption, got {reprlib.repr(value)}; write the caption as text")
    return check_caption(value, place)


def check_caption(caption: str, place: str) -> str:
    """The caption.

    Args:
        caption: text that is not blank.
        place: the caption in error messages.

    Raises:
        InputError: it is too long, or contains characters that are not text.
    """
    if problem := text_problem(caption):
        raise InputError(f"{place}: {problem}")
    return caption


def is_text(value: object) -> bool:
    """Whether the value is a string that is not blank."""
    return isinstance(value, str) and bool(value.strip())


def quoted(names: Iterable[str]) -> str:
    """The names in quotes, separated by commas; only the number of those beyond the first few."""
    names = list(names)
    more = [f"{len(names) - MAX_NAMES_IN_MESSAGE} more"] if len(names) > MAX_NAMES_IN_MESSAGE else []
    return ", ".join([*map(repr, names[:MAX_NAMES_IN_MESSAGE]), *more])
