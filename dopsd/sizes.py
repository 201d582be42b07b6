"""Image sizes that a model can be trained at."""

import math
from dataclasses import dataclass

from .errors import InputError, first_line
from .settings import DataSettings


MAX_ASPECT_RATIO = 8  # anything longer is most likely a typing error


@dataclass(frozen=True)
class SizeLimits:
    """Image sizes that a model can be trained at.

    Attributes:
        pixels_per_token: side of the square of pixels behind one image token.
        min_side: smallest height and width, in pixels.
        max_tokens: most image tokens.
    """

    pixels_per_token: int
    min_side: int
    max_tokens: int


def check_geometry(settings: DataSettings, limits: SizeLimits) -> None:
    """Checks `--resolution` and the buckets. Reads no file.

    Raises:
        InputError: the model cannot be trained at one of these sizes.
    """
    if problem := size_problem(settings.resolution, settings.resolution, limits):
        raise InputError(f"--resolution {settings.resolution}: {problem}")
    if settings.aspect_ratio_buckets is None:
        return
    if not settings.use_aspect_ratio_buckets:
        raise InputError("--aspect_ratio_buckets: needs --use_aspect_ratio_buckets; pass both or neither")
    from diffusers.training_utils import parse_buckets_string  # takes seconds

    try:
        buckets = parse_buckets_string(settings.aspect_ratio_buckets)
    except ValueError as error:
        raise InputError(
            f"--aspect_ratio_buckets {settings.aspect_ratio_buckets!r}: cannot be read ({first_line(error)}); write "
            "height,width;height,width"
        ) from error
    for height, width in buckets:
        if problem := size_problem(height, width, limits):
            raise InputError(f"--aspect_ratio_buckets {height},{width}: {problem}")


def size_problem(height: int, width: int, limits: SizeLimits) -> str | None:
    """Why a model cannot be trained at a size in pixels and what to do, or None if it can.

    The text continues a sentence, as in "a size that is too small; use at least 64 pixels per side".
    """
    if min(height, width) < limits.min_side:
        return f"too small; use at least {limits.min_side} pixels per side"
    if height % limits.pixels_per_token or width % limits.pixels_per_token:
        return f"not divisible into image tokens; use multiples of {limits.pixels_per_token} pixels"
    if problem := ratio_problem(height, width):
        return problem
    tokens = (height // limits.pixels_per_token) * (width // limits.pixels_per_token)
    if tokens > limits.max_tokens:
        side = math.isqrt(limits.max_tokens) * limits.pixels_per_token
        return f"too large ({tokens} image tokens, the limit is {limits.max_tokens}); use at most {side}x{side} pixels"
    return None


def ratio_problem(height: int, width: int) -> str | None:
    """Why a picture's shape cannot be used and what to do, or None if it can. The text continues a sentence."""
    if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
        return f"too long and narrow; use an aspect ratio of at most {MAX_ASPECT_RATIO}:1"
    return None


def cond_image_problem(height: int, width: int, limits: SizeLimits) -> str | None:
    """Why a picture of this size in pixels cannot be edited and what to do, or None if it can.

    It need not be divisible into image tokens, and may be large: pipelines crop and shrink it.
    """
    if min(height, width) < limits.min_side:
        return f"too small to edit; use at least {limits.min_side} pixels per side"
    return ratio_problem(height, width)
