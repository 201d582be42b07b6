"""The columns of a metadata file or data set that say more about a picture than its captions do."""

import math
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import InputError
from ..settings import DataSettings
from .captions import check_caption, check_column, is_text


# Endings of columns of paths in the metadata of `datasets`, which drops them: X_file_name becomes the column X.
PATH_ENDINGS = ("_file_name", "_file_names")


@dataclass(frozen=True)
class PictureColumns:
    """The columns with the pictures to edit and with the groups.

    Attributes:
        cond_images: columns with the pictures to edit, as the table spells them. Empty unless an editor is trained.
        group: column that names each picture's group. None if it follows from the folder.
    """

    cond_images: tuple[str, ...]
    group: str | None

    def group_of(self, row: Mapping[str, Any], place: str, default: str) -> str:
        """The group of a row's picture.

        Args:
            row: column -> value.
            place: the row in error messages.
            default: the group if there is no column for it.

        Raises:
            InputError: the value is neither text nor a number.
        """
        if self.group is None:
            return default
        value, place = row.get(self.group), f"{place}, column {self.group!r}"
        if is_text(value):
            return check_caption(value.strip(), place)
        if isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value):
            return str(value)
        raise InputError(f"{place}: expected a subject's name or number, got {reprlib.repr(value)}; write it there")


def find_picture_columns(columns: list[str], table: str, settings: DataSettings, target: str) -> PictureColumns:
    """Chooses the columns of `--cond_image_column` and `--group_column`.

    For `--cond_image_column`, X, X_file_name and X_file_names are the same column. If the table has several of them,
    it is the one that the flag spells.

    Args:
        columns: all columns of the table.
        table: the metadata file or data set in messages.
        target: the column with the training pictures.

    Raises:
        InputError: there is no such column, or it is the target's, or it is given twice.
    """
    cond_images = []
    for column in settings.cond_image_column or ():
        name = next((spelling for spelling in _spellings(column) if spelling in columns), column)
        check_column("--cond_image_column", name, columns, table, [other for other in columns if other != target])
        if name == target:
            raise InputError(
                f"--cond_image_column {column}: is also the column of --image_column; name the column with the "
                "pictures to edit"
            )
        if name in cond_images:
            raise InputError(f"--cond_image_column {column}: names the column {name!r} again; name each one once")
        cond_images.append(name)
    if settings.group_column is not None:
        check_column("--group_column", settings.group_column, columns, table)
    return PictureColumns(tuple(cond_images), settings.group_column)


def is_path_column(column: str) -> bool:
    """Whether a column of a metadata file holds paths, judging by its name."""
    return f"_{column}".endswith(PATH_ENDINGS)


def path_column(image_column: str) -> str:
    """The column of a metadata file that `--image_column` reads."""
    return "file_name" if image_column == "image" else f"{image_column}_file_name"


def _spellings(column: str) -> list[str]:
    stem = column
    if is_path_column(column):
        stem = f"_{column}".rpartition("_file_name")[0].removeprefix("_") or "image"
    return [column, stem, path_column(stem), f"{path_column(stem)}s"]
