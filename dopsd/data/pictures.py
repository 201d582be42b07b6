"""A training picture with its captions."""

import mimetypes
import posixpath
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import datasets
import pyarrow
from PIL import Image


class DatasetCell(NamedTuple):
    """A cell of a data set that holds an encoded picture, or an item of a cell that holds a list of them.

    Attributes:
        dataset: the data set, in Arrow's format, which decodes no picture.
        row: the row, from 0.
        column: the column.
        item: the place in the list, from 0; None if the cell is a picture.
    """

    dataset: datasets.Dataset
    row: int
    column: str
    item: int | None = None

    def read(self) -> pyarrow.StructScalar:
        """The encoded picture, or its path in an archive: {"bytes": ..., "path": ...}, of which nothing is copied."""
        cell = self.dataset[self.row][self.column][0]
        return cell if self.item is None else cell[self.item]


@dataclass(frozen=True, slots=True)
class PictureFile:
    """An encoded picture. It is not decoded until `images.read_image` is called.

    Attributes:
        name: the picture in messages: its path relative to the folder, or "row 12 of DATASET".
        source: where it is encoded. None if there is only a caption.
    """

    name: str
    source: Path | DatasetCell | None


@dataclass(frozen=True, slots=True)
class Picture:
    """One training picture and its captions.

    Attributes:
        name: the picture in messages: its path relative to the folder, or "row 12 of DATASET".
        captions: the student's captions. One of them is drawn each time the picture is used.
        source: the encoded picture. None if there is only a caption, which is enough for a teacher with its own
            captions.
        teacher_caption: the teacher's caption. None if the teacher has no captions of its own.
        cond_images: the pictures to edit, of which this one is the result. Empty unless an editor is trained.
        group: pictures of the same group show the same subject.
    """

    name: str
    captions: tuple[str, ...]
    source: Path | DatasetCell | None
    teacher_caption: str | None = None
    cond_images: tuple[PictureFile, ...] = ()
    group: str = ""

    @property
    def file(self) -> PictureFile:
        return PictureFile(self.name, self.source)


def is_picture(name: str) -> bool:
    """Whether a file is a picture, judging by its name.

    This includes formats that Pillow cannot open, so that such a file becomes an error instead of being skipped.
    """
    pillow_format = Image.registered_extensions().get(posixpath.splitext(name)[1].lower())
    # Pillow's JPEG plugin opens MPO, the format of phones that add a gain map or a second view.
    pillow_opens = pillow_format in (*Image.OPEN, "MPO") and Image.MIME.get(pillow_format, "").startswith("image/")
    return pillow_opens or (mimetypes.guess_type(name, strict=False)[0] or "").startswith("image/")
