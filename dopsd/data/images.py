"""Decoding of pictures to 8-bit RGB."""

import hashlib
import io
import struct
from pathlib import Path
from typing import NamedTuple

import fsspec
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm.auto import tqdm

from ..errors import InputError, first_line
from .pictures import Picture


# Pillow documents no base class for its errors. This list was found by damaging files of many formats; RuntimeError
# comes from the AVIF decoder.
PILLOW_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    IndexError,
    RuntimeError,
    struct.error,
    Image.DecompressionBombError,
)


class Decoded(NamedTuple):
    """A decoded picture.

    Attributes:
        image: 8-bit RGB.
        digest: SHA-256 of the encoded picture in hexadecimal.
    """

    image: Image.Image
    digest: str


def read_image(picture: Picture) -> Image.Image:
    """Decodes a picture to 8-bit RGB; see `decode`."""
    return decode(picture).image


def decode(picture: Picture) -> Decoded:
    """Decodes a picture to 8-bit RGB.

    The first frame is read, turned upright as its EXIF data say, and put on white where it is transparent.

    Raises:
        InputError: the picture is missing, damaged or of an unknown format.
    """
    try:
        encoded = source_bytes(picture)
        with Image.open(io.BytesIO(encoded)) as image:
            image.load()
            # Parses the EXIF data, which exif_transpose takes from here. It would also rewrite the encoded data in
            # `info`, and fails if they contain an invalid tag.
            image.getexif()
            image.info.pop("exif", None)
            return Decoded(to_rgb(ImageOps.exif_transpose(image)), hashlib.sha256(encoded).hexdigest())
    except PILLOW_ERRORS as error:
        reason = "unknown format" if isinstance(error, UnidentifiedImageError) else first_line(error)
        raise InputError(
            f"{picture.name}: cannot be read as a picture ({reason}); convert it to JPEG or PNG, or remove it"
        ) from error


def source_bytes(picture: Picture) -> bytes:
    """The encoded picture.

    Raises:
        OSError: its file cannot be read.
        ValueError: its cell in the data set is empty.
    """
    if isinstance(picture.source, Path):
        return picture.source.read_bytes()
    dataset, row, column = picture.source
    cell = dataset[row][column] or {"bytes": None, "path": None}
    if cell["bytes"] is not None:
        return cell["bytes"]
    if cell["path"] is None:
        raise ValueError(f"column {column!r} is empty")
    with fsspec.open(cell["path"], "rb") as file:  # the path may point into an archive: zip://...
        return file.read()


def to_rgb(image: Image.Image) -> Image.Image:
    """Converts an image of any mode to RGB, with transparent pixels on white.

    Raises:
        ValueError: the range of its pixels is unknown.
    """
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers of unknown range")
    if image.mode.startswith("I"):
        image = to_8_bits(image)
    if not image.has_transparency_data:
        return image.convert("RGB")
    if image.mode == "La":
        image = image.convert("LA")  # the only mode that Pillow converts premultiplied grayscale to
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB")


def to_8_bits(image: Image.Image) -> Image.Image:
    """Scales a 16-bit grayscale image (modes I and I;16) to 8 bits, modes L or LA. `Image.convert` would clip it.

    Raises:
        ValueError: a pixel is not in 0..65535.
    """
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError("its pixels do not fit in 16 bits")
    gray = Image.fromarray(np.rint(values / 257).astype(np.uint8))
    if "transparency" in image.info:
        opaque = values != image.info["transparency"]
        gray.putalpha(Image.fromarray(np.where(opaque, 255, 0).astype(np.uint8)))
    return gray


class CheckedPicture(NamedTuple):
    """What planning and caching need to know of a picture.

    Attributes:
        size: upright (height, width) in pixels.
        digest: SHA-256 of the encoded picture in hexadecimal; "" for a caption without a picture.
    """

    size: tuple[int, int]
    digest: str


def check_pictures(pictures: list[Picture], *, resolution: int, disable_progress: bool) -> list[CheckedPicture]:
    """Reads and decodes every picture once to check it. Keeps none of them in memory.

    Args:
        pictures: the pictures to check.
        resolution: height and width, in pixels, to return for a caption without a picture.
        disable_progress: whether to hide the progress bar.

    Raises:
        InputError: a picture cannot be decoded.
    """
    checked = []
    for picture in tqdm(pictures, desc="Reading pictures", disable=disable_progress):
        if picture.source is None:
            checked.append(CheckedPicture((resolution, resolution), ""))
        else:
            image, digest = decode(picture)
            checked.append(CheckedPicture((image.height, image.width), digest))
    return checked
