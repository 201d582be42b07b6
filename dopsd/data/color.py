"""Conversion of pictures to sRGB by their embedded ICC profiles."""

import functools
import io

import numpy as np
from PIL import Image, ImageCms

from ..errors import first_line


# What a picture of each of these modes may have a profile for. A grey picture may have an RGB profile too.
COLOR_SPACES = {"L": ("GRAY", "RGB"), "RGB": ("RGB",), "CMYK": ("CMYK",)}

# Vendors' sRGB profiles round differently. Other color spaces are many times farther away.
MAX_SRGB_DIFFERENCE = 2  # of 255


class ProfileError(Exception):
    """A profile is damaged, or does not fit the picture."""


def to_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """Converts a picture to sRGB.

    Args:
        image: the picture, of mode L, RGB or CMYK.
        profile: the picture's ICC profile.

    Returns:
        The picture as it is if its profile is an sRGB profile, else an RGB picture.

    Raises:
        ProfileError: the profile cannot be used.
    """
    space = color_space(profile)
    if space not in COLOR_SPACES[image.mode]:
        raise ProfileError(f"it is for {space} pictures, not for {image.mode}")
    if image.mode == "L" and space == "RGB":
        image = image.convert("RGB")
    transform = _transform(profile, image.mode)
    return image if transform is None else transform.apply(image)


def color_space(profile: bytes) -> str:
    """The color space of a profile, such as GRAY, RGB or CMYK.

    Raises:
        ProfileError: the profile is damaged.
    """
    return _open_profile(profile).profile.xcolor_space.strip()


def _open_profile(profile: bytes) -> ImageCms.ImageCmsProfile:
    try:
        return ImageCms.ImageCmsProfile(io.BytesIO(profile))
    except (ImageCms.PyCMSError, OSError) as error:
        raise ProfileError(first_line(error)) from error


@functools.lru_cache(maxsize=8)  # the pictures of a data set share a few profiles
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """The transform from a profile to sRGB; None if it is the identity, up to rounding."""
    try:
        transform = ImageCms.buildTransform(
            _open_profile(profile),
            ImageCms.createProfile("sRGB"),
            mode,
            "RGB",
            # Keeps every color that sRGB has. The perceptual intent, Pillow's default, moves these too, in a way that
            # each vendor chooses. The compensation maps the profile's black to black instead of clipping shadows.
            ImageCms.Intent.RELATIVE_COLORIMETRIC,
            ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
    except ImageCms.PyCMSError as error:
        raise ProfileError(first_line(error)) from error
    if mode == "CMYK":
        return transform
    samples = _samples(mode)
    difference = np.asarray(transform.apply(samples), dtype=int) - np.asarray(samples.convert("RGB"), dtype=int)
    return None if abs(difference).max() <= MAX_SRGB_DIFFERENCE else transform


def _samples(mode: str) -> Image.Image:
    """All 256 levels of grey, or 17 ** 3 colors."""
    if mode == "L":
        return Image.fromarray(np.arange(256, dtype=np.uint8)[None])
    levels = np.linspace(0, 255, 17).round().astype(np.uint8)
    return Image.fromarray(np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(1, -1, 3))
