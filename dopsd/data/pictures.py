"""A training picture with its captions, and how picture files are found in a folder."""

import mimetypes
import posixpath
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import datasets
from PIL import Image


class DatasetCell(NamedTuple):
    """A cell of a data set that holds an encoded picture."""

    dataset: datasets.Dataset
    row: int
    column: str


@dataclass(frozen=True)
class Picture:
    """One picture and its captions. The picture itself is not decoded until `images.read_image` is called.

    Attributes:
        name: the picture in messages: its path relative to the folder, or "row 12 of DATASET".
        captions: the student's captions. One of them is drawn each time the picture is used.
        source: the encoded picture. None if there is only a caption, which is enough for a teacher with its own
            captions.
        teacher_caption: the teacher's caption. None if the teacher has no captions of its own.
    """

    name: str
    captions: tuple[str, ...]
    source: Path | DatasetCell | None
    teacher_caption: str | None = None


def is_picture(name: str) -> bool:
    """Whether a file is a picture, judging by its name.

    This includes formats that Pillow cannot open, so that such a file becomes an error instead of being skipped.
    """
    pillow_format = Image.registered_extensions().get(posixpath.splitext(name)[1].lower())
    pillow_opens = pillow_format in Image.OPEN and Image.MIME.get(pillow_format, "").startswith("image/")
    return pillow_opens or (mimetypes.guess_type(name, strict=False)[0] or "").startswith("image/")


def visible_files(folder: Path, parents: tuple[Path, ...] = ()) -> Iterator[Path]:
    """Yields the files in a folder and its subfolders. Follows links.

    Files and subfolders whose names start with "." or "__" are skipped.

    Args:
        folder: the folder to search.
        parents: the resolved folders that are being searched already, for the recursion.
    """
    parents = (*parents, folder.resolve())
    for path in folder.iterdir():
        if path.name.startswith((".", "__")):
            continue
        if not path.is_dir():
            yield path
        elif path.resolve() not in parents:  # a link to a parent folder would recurse forever
            yield from visible_files(path, parents)
