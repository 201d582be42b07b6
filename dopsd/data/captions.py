"""Captions from `--instance_prompt`, from .txt files, and from the columns of a metadata file or data set."""

import posixpath
import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate.logging import get_logger

from ..errors import InputError
from ..settings import DataSettings
from .pictures import DatasetCell, Picture


logger = get_logger(__name__)


def prompt_captions(pictures: list[str], settings: DataSettings) -> dict[str, str]:
    """Picture -> `--instance_prompt`.

    Raises:
        InputError: there is no prompt.
    """
    if not is_text(settings.instance_prompt):
        raise InputError(
            f"--instance_data_dir {settings.instance_data_dir}: its pictures have no captions; pass "
            "--instance_prompt, or add a .txt file beside each picture, or a metadata.jsonl or metadata.csv at the top"
        )
    return {name: settings.instance_prompt for name in pictures}


def sidecar_captions(
    folder: Path, sidecars: list[str], pictures: list[str], instance_prompt: str | None
) -> dict[str, str]:
    """Picture -> text of the .txt file beside it, which has the same name up to the extension.

    Args:
        folder: the folder that the names are relative to.
        sidecars: names of all .txt files.
        pictures: names of all pictures.
        instance_prompt: is not used; a warning says so.

    Raises:
        InputError: a picture has no .txt file or the reverse, or a file is empty or not UTF-8.
    """
    sidecar_of = {posixpath.splitext(name)[0]: name for name in sidecars}
    stem_of = {name: posixpath.splitext(name)[0] for name in pictures}
    for name, stem in stem_of.items():
        if stem not in sidecar_of:
            raise InputError(
                f"{name}: has no caption, although other pictures have a .txt file; write its caption to {stem}.txt"
            )
    unpaired = sidecar_of.keys() - stem_of.values()
    for stem, sidecar in sidecar_of.items():
        if stem in unpaired:
            raise InputError(
                f"{sidecar}: there is no picture named {posixpath.basename(stem)} beside it; add the picture, or move "
                "the file elsewhere"
            )
    if is_text(instance_prompt):
        logger.warning("--instance_prompt is not used: the captions come from the .txt files beside the pictures")
    return {name: _sidecar_text(folder, sidecar_of[stem]) for name, stem in stem_of.items()}


def _sidecar_text(folder: Path, name: str) -> str:
    text = read_text(folder, name).strip()
    if not text:
        raise InputError(f"{name}: is empty; write the caption into it")
    return text


def read_text(folder: Path, name: str) -> str:
    """Reads a UTF-8 file, with or without a byte order mark. Line endings are kept as they are."""
    try:
        return (folder / name).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{name}: is not UTF-8 text (byte {error.start}); save it as UTF-8") from error


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
        self, row: Mapping[str, Any], *, place: str, source: Path | DatasetCell | None, name: str | None = None
    ) -> Picture:
        """The picture of a row, with its captions.

        Args:
            row: column -> value.
            place: the row in error messages, such as "metadata.jsonl line 3".
            source: the encoded picture, if there is one.
            name: the picture's name. Default: `place`.

        Raises:
            InputError: a caption is missing, empty or not text.
        """
        captions = tuple(_caption(row, column, place) for column in self.student) or (self.prompt,)
        teacher_caption = None if self.teacher is None else _caption(row, self.teacher, place)
        return Picture(name or place, captions, source, teacher_caption)


def find_caption_columns(
    columns: list[str], table: str, settings: DataSettings, teacher_caption_column: str | None
) -> CaptionColumns:
    """Chooses the caption columns of a metadata file or data set by the flags.

    Args:
        columns: all columns of the table.
        table: the metadata file or data set in messages.

    Raises:
        InputError: a flag names a column that does not exist, or there are no captions.
    """
    if teacher_caption_column is not None:
        check_column("--teacher_caption_column", teacher_caption_column, columns, table)
    for column in settings.caption_column or ():
        check_column("--caption_column", column, columns, table)
    has_prompt = is_text(settings.instance_prompt)
    if settings.caption_column and has_prompt:
        logger.warning("--instance_prompt is not used: the captions come from --caption_column")
    elif has_prompt:
        logger.warning(
            f"--instance_prompt is the caption of every picture in {table}; to use captions from a column, pass "
            f"--caption_column with one of {quoted(columns)}"
        )
    elif not settings.caption_column:
        raise InputError(
            f"{table}: needs captions; pass --caption_column with one or more of {quoted(columns)}, or one "
            "--instance_prompt for all pictures"
        )
    return CaptionColumns(tuple(settings.caption_column or ()), teacher_caption_column, settings.instance_prompt)


def check_column(flag: str, column: str, columns: list[str], table: str) -> None:
    """Raises `InputError` if a flag names a column that the table does not have."""
    if column not in columns:
        raise InputError(f"{flag} {column}: {table} has no such column; choose one of {quoted(columns)}")


def _caption(row: Mapping[str, Any], column: str, place: str) -> str:
    value = row.get(column)
    if not is_text(value):
        raise InputError(
            f"{place}, column {column!r}: expected a caption, got {reprlib.repr(value)}; write the caption as text"
        )
    return value


def is_text(value: object) -> bool:
    """Whether the value is a string that is not blank."""
    return isinstance(value, str) and bool(value.strip())


def quoted(names: Iterable[str]) -> str:
    """The names in quotes, separated by commas."""
    return ", ".join(map(repr, names))
