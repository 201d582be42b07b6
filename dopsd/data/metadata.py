"""Pictures and captions that a metadata.jsonl or metadata.csv in the folder lists.

`datasets` is not used to read these files: it turns the caption `None` into null and `007` into a number, and it
renames columns.
"""

import csv
import io
import json
import posixpath
import reprlib
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..settings import DataSettings
from .captions import CaptionColumns, find_caption_columns, is_text, may_hold_captions, quoted
from .files import FolderFiles, read_text
from .pictures import Picture


METADATA_NAMES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")


@dataclass(frozen=True)
class Row:
    """A row of a metadata file.

    Attributes:
        line: number of its first line, counted from 1.
        place: the row in error messages, such as "metadata.jsonl line 3".
        values: column -> value.
    """

    line: int
    place: str
    values: dict[str, Any]


def find_metadata(names: list[str]) -> str | None:
    """Returns the folder's metadata file, if there is one.

    Args:
        names: paths of all files, relative to the folder.

    Raises:
        InputError: there are several metadata files, or there is one that is not read.
    """
    found = [name for name in names if posixpath.basename(name) in METADATA_NAMES]
    for name in found:
        if name.endswith(".parquet"):
            raise InputError(
                f"{name}: --instance_data_dir does not read Parquet files; pass the folder as --dataset_name"
            )
        if "/" in name:
            raise InputError(
                f"{name}: metadata in a subfolder is not read; put one metadata file at the top of --instance_data_dir"
            )
    if len(found) > 1:
        raise InputError(f"{', '.join(found)}: --instance_data_dir has two metadata files; keep one of them")
    return found[0] if found else None


def metadata_pictures(
    files: FolderFiles, metadata: str, pictures: list[str], settings: DataSettings, teacher_caption_column: str | None
) -> list[Picture]:
    """The pictures that a metadata file lists, sorted by path.

    A folder without pictures is only read for the teacher's captions. If there is no column of paths either, the
    captions are returned without pictures, in row order.

    Args:
        files: the folder's files.
        metadata: name of the metadata file.
        pictures: names of all pictures in the folder.
        settings: flags that choose the columns.
        teacher_caption_column: column with the teacher's captions, if it has captions of its own.

    Raises:
        InputError: rows and pictures do not match, or a row, caption or column is missing or malformed.
    """
    rows = read_rows(files.paths[metadata], metadata)
    columns = list(dict.fromkeys(column for row in rows for column in row.values))
    path_column = "file_name" if settings.image_column == "image" else f"{settings.image_column}_file_name"
    text_columns = [
        column
        for column in columns
        if not _is_path_column(column) and may_hold_captions(row.values.get(column) for row in rows)
    ]
    captions = find_caption_columns(columns, text_columns, metadata, settings, teacher_caption_column)
    if path_column in columns:
        found = _listed_pictures(files, rows, path_column, captions)
        _check_every_picture_has_a_row(files, pictures, rows, metadata)
        return sorted(found, key=lambda picture: picture.name)
    if not pictures:
        return [captions.picture(row.values, place=row.place, source=None) for row in rows]
    raise InputError(
        f"{metadata}: --image_column {settings.image_column} needs the column {path_column!r}, but there are only "
        f"{quoted(columns)}; add the column, or pass --image_column X to read the column X_file_name"
    )


def _is_path_column(column: str) -> bool:
    return column == "file_name" or column.endswith("_file_name")


def _listed_pictures(files: FolderFiles, rows: list[Row], path_column: str, captions: CaptionColumns) -> list[Picture]:
    pictures = []
    line_of: dict[str, int] = {}
    for row in rows:
        value, place = row.values.get(path_column), f"{row.place}, column {path_column!r}"
        if not is_text(value):
            raise InputError(
                f"{place}: expected the path of a picture, got {reprlib.repr(value)}; write the path there"
            )
        name = files.find(value, place)
        if name in line_of:
            raise InputError(
                f"{row.place}: {name} is already listed in line {line_of[name]}; put several captions of one picture "
                "into several columns"
            )
        line_of[name] = row.line
        pictures.append(captions.picture(row.values, place=row.place, source=files.path(name), name=name))
    return pictures


def _check_every_picture_has_a_row(files: FolderFiles, pictures: list[str], rows: list[Row], metadata: str) -> None:
    # Editing pairs have several columns of paths, so a picture may be in any of them.
    with_row = set()
    for row in rows:
        for column, value in row.values.items():
            if _is_path_column(column) and isinstance(value, str):
                with suppress(InputError):  # only the paths in --image_column's column must exist
                    with_row.add(files.find(value, row.place))
    without_row = [name for name in pictures if name not in with_row]
    if without_row:
        raise InputError(
            f"{without_row[0]}: has no row in {metadata} ({len(without_row)} of {len(pictures)} pictures have none); "
            "add the row, or move the picture elsewhere"
        )


def read_rows(path: Path, metadata: str) -> list[Row]:
    """Reads a metadata file, which is called `metadata` in messages.

    Raises:
        InputError: it is malformed or has no rows.
    """
    parse = _parse_csv if metadata.endswith(".csv") else _parse_jsonl
    return [Row(line, _place(metadata, line), values) for line, values in parse(metadata, read_text(path, metadata))]


def _place(metadata: str, line: int) -> str:
    return f"{metadata} line {line}"


def _parse_jsonl(metadata: str, text: str) -> list[tuple[int, dict[str, Any]]]:
    """(line, values) of each row."""
    rows = []
    # str.splitlines would also split at characters that JSON allows in a string, such as U+2028.
    for line, row_text in enumerate(text.split("\n"), start=1):
        if not row_text.strip():
            continue
        try:
            values = json.loads(row_text)
        except json.JSONDecodeError as error:
            raise InputError(f"{_place(metadata, line)}: is not valid JSON ({error}); correct it") from error
        except (ValueError, RecursionError) as error:  # Python reads at most 4,300 digits
            raise InputError(
                f"{_place(metadata, line)}: contains a number that is too long, or brackets in too many levels; "
                "correct it"
            ) from error
        if not isinstance(values, dict):
            raise InputError(
                f"{_place(metadata, line)}: is not a JSON object; write "
                '{"file_name": "PICTURE.png", "text": "CAPTION"}'
            )
        rows.append((line, values))
    if not rows:
        raise InputError(f"{metadata}: has no rows; write one for each picture, or delete the file")
    return rows


def _parse_csv(metadata: str, text: str) -> list[tuple[int, dict[str, str]]]:
    """(line, values) of each row. All values are text."""
    records = _csv_records(metadata, text)
    if len(records) < 2:
        raise InputError(f"{metadata}: has no rows; write the column names, then one row for each picture")
    header = records[0][1]
    if len({*header}) < len(header):
        raise InputError(f"{metadata}: a column name is used twice in {quoted(header)}; rename one of the columns")
    for line, values in records[1:]:
        if len(values) != len(header):
            raise InputError(
                f"{_place(metadata, line)}: expected {len(header)} values, got {len(values)}; write one value per "
                "column, in quotes if it contains a comma"
            )
    return [(line, dict(zip(header, values, strict=True))) for line, values in records[1:]]


def _csv_records(metadata: str, text: str) -> list[tuple[int, list[str]]]:
    """(line, values) of each record, including the header. A record with quoted line breaks spans several lines."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    records = []
    line = 1
    try:
        for values in reader:
            if values:  # an empty line is read as []
                records.append((line, values))
            line = reader.line_num + 1
    except csv.Error as error:
        raise InputError(f"{_place(metadata, line)}: is not valid CSV ({error}); correct it") from error
    return records
