"""Decoding of pictures to 8-bit RGB."""

import hashlib
import io
import struct
from pathlib import Path
from typing import NamedTuple

import fsspec
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ..errors import InputError, first_line
from .color import ProfileError, to_srgb
from .files import read_regular_file
from .pictures import Picture, PictureFile


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

CONVERT = "convert it to JPEG or PNG, or remove it"


class SourceError(ValueError):
    """There is no encoded picture."""


class Decoded(NamedTuple):
    """A decoded picture.

    Attributes:
        image: 8-bit RGB, in sRGB.
        digest: SHA-256 of the encoded picture in hexadecimal.
        profile_problem: why its color profile could not be used. None if it was used, or if there is none.
    """

    image: Image.Image
    digest: str
    profile_problem: str | None


def read_image(picture: Picture | PictureFile) -> Image.Image:
    """Decodes a picture to 8-bit RGB; see `decode`."""
    return decode(picture).image


def decode(picture: Picture | PictureFile) -> Decoded:
    """Decodes a picture to 8-bit RGB.

    The first frame is read, turned upright as its EXIF data say, converted to sRGB if it has a color profile, and put
    on white where it is transparent.

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
            profile = image.info.pop("icc_profile", None)
            upright, digest = ImageOps.exif_transpose(image), hashlib.sha256(encoded).hexdigest()
            try:
                return Decoded(to_rgb(upright, profile), digest, None)
            except ProfileError as error:
                return Decoded(to_rgb(upright), digest, str(error))
    except PILLOW_ERRORS as error:
        raise InputError(f"{picture.name}: cannot be read as a picture ({_reason_and_advice(error)}") from error


def _reason_and_advice(error: Exception) -> str:
    """The end of the message for a picture that cannot be read, from inside the parenthesis."""
    if isinstance(error, UnidentifiedImageError):
        return f"unknown format); {CONVERT}"
    if isinstance(error, Image.DecompressionBombError):
        return f"more than {2 * Image.MAX_IMAGE_PIXELS / 1e6:.0f} megapixels); shrink it, or remove it"
    if isinstance(error, OSError) and error.errno is not None:  # the file could not be read
        return f"{error.strerror}); correct that, or remove it"
    if isinstance(error, SourceError):
        return f"{error}); add the picture, or remove the row"
    if "MAX_TEXT_" in str(error) or "memory used in text chunks" in str(error):
        return "its text metadata or color profile are too large); save it again without them, or remove it"
    return f"{first_line(error)}); {CONVERT}"


def source_bytes(picture: Picture | PictureFile) -> bytes:
    """The encoded picture.

    Raises:
        OSError: its file cannot be read.
        SourceError: its cell in the data set is empty.
    """
    if isinstance(picture.source, Path):
        return read_regular_file(picture.source)
    cell = picture.source.read()
    content, path = (cell["bytes"].as_py(), cell["path"].as_py()) if cell.is_valid else (None, None)
    if content is not None:
        return content
    if path is None:
        raise SourceError(f"column {picture.source.column!r} is empty")
    with fsspec.open(path, "rb") as file:  # in an archive: zip://..., checked by `cells.picture_files`
        return file.read()


def to_rgb(image: Image.Image, profile: bytes | None = None) -> Image.Image:
    """Converts an image of any mode to RGB, with transparent pixels on white.

    Args:
        image: the image.
        profile: its ICC profile, if it has one: the result is then sRGB.

    Raises:
        ValueError: the range of its pixels is unknown.
        ProfileError: the profile cannot be used.
    """
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers of unknown range")
    if image.mode.startswith("I"):
        image = to_8_bits(image)
    is_gray = image.mode in ("1", "L", "LA", "La")
    if image.has_transparency_data:
        if image.mode == "La":
            image = image.convert("LA")  # the only mode that Pillow converts premultiplied grayscale to
        image = image.convert("RGBA")
    colors = image
    if profile and image.mode != "LAB":  # the colors of a LAB picture are known without a profile
        if image.mode != "CMYK":
            colors = image.convert("RGB")
        colors = to_srgb(colors.getchannel("R") if is_gray else colors, profile)
        colors.info.pop("icc_profile", None)  # sRGB, which `to_srgb` may attach
    colors = colors.convert("RGB")
    if not image.has_transparency_data:
        return colors
    white = Image.new("RGB", image.size, "white")
    return Image.composite(colors, white, image.getchannel("A"))


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
