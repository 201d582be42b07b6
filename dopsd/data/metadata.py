"""Pictures and captions that a metadata.jsonl or metadata.csv in the folder lists.

`datasets` is not used to read these files: it turns the caption `None` into null and `007` into a number, and it
renames columns.
"""

import csv
import io
import json
import posixpath
import reprlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..settings import DataSettings
from .captions import CaptionColumns, find_caption_columns, is_text, may_hold_captions, quoted
from .columns import PictureColumns, find_picture_columns, is_path_column, path_column
from .files import FolderFiles, read_text
from .pictures import Picture, PictureFile


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

    The teacher's captions need no training pictures. If a folder has no column of their paths, and no pictures but
    those to edit, the captions are returned without pictures, in row order.

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
    target = path_column(settings.image_column)
    also = find_picture_columns(columns, metadata, settings, target)
    text_columns = [
        column
        for column in columns
        if not is_path_column(column)
        and column not in (*also.cond_images, also.group)
        and may_hold_captions(row.values.get(column) for row in rows)
    ]
    captions = find_caption_columns(columns, text_columns, metadata, settings, teacher_caption_column)
    needs_no_targets = teacher_caption_column is not None and also.cond_images and settings.image_column == "image"
    if target in columns:
        found = sorted(_listed_pictures(files, rows, target, captions, also), key=lambda picture: picture.name)
    elif not pictures or needs_no_targets:
        found = [
            captions.picture(
                row.values, place=row.place, source=None, cond_images=_cond_images(files, row, also.cond_images)
            )
            for row in rows
        ]
    else:
        raise InputError(
            f"{metadata}: --image_column {settings.image_column} needs the column {target!r}, but there are only "
            f"{quoted(columns)}; add the column, or pass --image_column X to read the column X_file_name"
        )
    _check_every_picture_has_a_row(files, pictures, rows, metadata, also.cond_images)
    return found


def _listed_pictures(
    files: FolderFiles, rows: list[Row], target: str, captions: CaptionColumns, also: PictureColumns
) -> list[Picture]:
    pictures = []
    line_of: dict[str, int] = {}
    for row in rows:
        name = _find_picture(files, row.values.get(target), f"{row.place}, column {target!r}")
        if name in line_of:
            advice = "put several captions of one picture into several columns"
            if also.cond_images:
                advice = "give each row a file of its own"
            raise InputError(f"{row.place}: {name} is already listed in line {line_of[name]}; {advice}")
        line_of[name] = row.line
        pictures.append(
            captions.picture(
                row.values,
                place=row.place,
                source=files.path(name),
                name=name,
                cond_images=_cond_images(files, row, also.cond_images),
                group=also.group_of(row.values, row.place, posixpath.dirname(name)),
            )
        )
    return pictures


def _find_picture(files: FolderFiles, written: object, place: str) -> str:
    """The name of the file that a value in a column of paths means."""
    if not is_text(written):
        raise InputError(f"{place}: expected the path of a picture, got {reprlib.repr(written)}; write the path there")
    return files.find(written, place)


def _cond_images(files: FolderFiles, row: Row, cond_columns: tuple[str, ...]) -> tuple[PictureFile, ...]:
    """The pictures to edit of a row. A value is a path, or a list of paths."""
    found = []
    for column in cond_columns:
        value, place = row.values.get(column), f"{row.place}, column {column!r}"
        if value == []:
            raise InputError(f"{place}: is an empty list; write the path of a picture to edit into it")
        if isinstance(value, list):
            places = [f"{place}, item {number} of {len(value)}" for number in range(1, len(value) + 1)]
        else:
            value, places = [value], [place]
        names = [_find_picture(files, written, item) for written, item in zip(value, places, strict=True)]
        found += [PictureFile(name, files.path(name)) for name in names]
    return tuple(found)


def _check_every_picture_has_a_row(
    files: FolderFiles, pictures: list[str], rows: list[Row], metadata: str, cond_columns: tuple[str, ...]
) -> None:
    # Editing pairs have several columns of paths, so a picture may be in any of them.
    with_row = set()
    for row in rows:
        for path in _written_paths(row, cond_columns):
            with suppress(InputError):  # only the paths in the columns that are read must exist
                with_row.add(files.find(path, row.place))
    without_row = [name for name in pictures if name not in with_row]
    if without_row:
        raise InputError(
            f"{without_row[0]}: has no row in {metadata} ({len(without_row)} of {len(pictures)} pictures have none); "
            "add the row, or move the picture elsewhere"
        )


def _written_paths(row: Row, cond_columns: tuple[str, ...]) -> Iterator[str]:
    for column, value in row.values.items():
        if is_path_column(column) or column in cond_columns:
            yield from (path for path in (value if isinstance(value, list) else [value]) if isinstance(path, str))


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
