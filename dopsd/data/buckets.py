"""Sizes that pictures are trained at, and their crops."""

import random
from dataclasses import dataclass

from diffusers.training_utils import find_nearest_bucket, generate_aspect_ratio_buckets, parse_buckets_string
from PIL import Image, ImageOps

from ..errors import InputError
from ..settings import DataSettings
from ..sizes import SizeLimits, size_problem
from .pictures import Picture


@dataclass(frozen=True)
class Example:
    """One repeat of a picture, with a crop that is drawn once and kept for the whole run.

    Attributes:
        picture: index into the pictures.
        repeat: which of the `--repeats` it is, from 0.
        bucket: (height, width) of the crop in pixels.
        centering: (x, y) of the crop in the picture, from 0 (left, top) to 1 (right, bottom).
    """

    picture: int
    repeat: int
    bucket: tuple[int, int]
    centering: tuple[float, float]


def bucket_for(height: int, width: int, settings: DataSettings, limits: SizeLimits) -> tuple[int, int]:
    """The (height, width), in pixels, that a picture of this height and width is cropped to."""
    if not settings.use_aspect_ratio_buckets:
        return (settings.resolution, settings.resolution)
    if settings.aspect_ratio_buckets is None:
        resolution = min(settings.resolution, round((height * width) ** 0.5))  # small pictures are not enlarged
        buckets = generate_aspect_ratio_buckets(resolution, divisibility=limits.pixels_per_token)
    else:
        buckets = parse_buckets_string(settings.aspect_ratio_buckets)
    return buckets[find_nearest_bucket(height, width, buckets)]


def plan_examples(
    pictures: list[Picture], sizes: list[tuple[int, int]], settings: DataSettings, limits: SizeLimits, seed: int
) -> list[Example]:
    """Makes `--repeats` examples of every picture.

    A crop depends on the seed, the picture's index and the repeat alone.

    Args:
        pictures: the pictures.
        sizes: their (height, width) in pixels.
        settings: resolution, buckets, repeats and whether to crop at the center.
        limits: sizes that the model can be trained at.
        seed: `--seed`.

    Raises:
        InputError: a picture would be trained at a size outside the limits.
    """
    examples = []
    for index, (picture, (height, width)) in enumerate(zip(pictures, sizes, strict=True)):
        bucket = bucket_for(height, width, settings, limits)
        if problem := size_problem(*bucket, limits):
            raise InputError(
                f"{picture.name}: {height}x{width} pixels fall into the bucket {bucket[0]}x{bucket[1]} at "
                f"--resolution {settings.resolution}, which is {problem} (change --resolution or the picture)"
            )
        for repeat in range(settings.repeats):
            rng = random.Random(f"{seed}/crop/{index}/{repeat}")
            position = (0.5, 0.5) if settings.center_crop else (rng.random(), rng.random())
            examples.append(Example(index, repeat, bucket, _centering(position, (height, width), bucket)))
    return examples


def _centering(position: tuple[float, float], size: tuple[int, int], bucket: tuple[int, int]) -> tuple[float, float]:
    """The crop's (x, y) position; 0.5 along a side that is not cropped, so that equal crops are encoded only once."""
    height, width = size
    is_cut_in_width = width * bucket[0] > height * bucket[1]
    is_cut_in_height = width * bucket[0] < height * bucket[1]
    return (position[0] if is_cut_in_width else 0.5, position[1] if is_cut_in_height else 0.5)


def crop_image(image: Image.Image, example: Example, flip: bool) -> Image.Image:
    """Scales and crops a picture to the bucket of its example, and mirrors it if `flip` is true."""
    height, width = example.bucket
    image = ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS, centering=example.centering)
    return ImageOps.mirror(image) if flip else image
