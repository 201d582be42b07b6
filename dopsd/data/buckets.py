"""Sizes that pictures are trained at, and their crops."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from diffusers.training_utils import find_nearest_bucket, generate_aspect_ratio_buckets, parse_buckets_string
from PIL import Image, ImageOps

from ..errors import InputError
from ..settings import DataSettings
from ..sizes import SizeLimits, cond_image_problem, size_problem
from .pictures import Picture, PictureFile


class Framing(NamedTuple):
    """How a picture is scaled and cropped.

    Attributes:
        size: (height, width) of the crop in pixels.
        centering: (x, y) of the crop in the picture, from 0 (left, top) to 1 (right, bottom).
    """

    size: tuple[int, int]
    centering: tuple[float, float]


@dataclass(frozen=True, slots=True)
class Crop:
    """A picture as an encoder sees it: scaled and cropped, and possibly mirrored.

    Attributes:
        file: the encoded picture, which `digest` identifies.
        digest: SHA-256 of the encoded picture; "" for a caption without a picture.
        framing: size and place of the crop.
        flip: whether it is mirrored.
    """

    file: PictureFile = field(compare=False)
    digest: str
    framing: Framing
    flip: bool = False

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return self.framing.size

    @property
    def key(self) -> list[Any]:
        """What its pixels depend on, for `context_cache.content_key`."""
        return [self.digest, *self.framing.size, *self.framing.centering, self.flip]

    def apply(self, image: Image.Image) -> Image.Image:
        """The crop of the decoded picture."""
        return crop_image(image, self.framing, self.flip)


@dataclass(frozen=True, slots=True)
class Example:
    """One repeat of a picture, with a crop that is drawn once and kept for the whole run.

    Attributes:
        picture: index into the pictures.
        repeat: which of the `--repeats` it is, from 0.
        bucket: (height, width) of the crop in pixels.
        centering: (x, y) of the crop in the picture, from 0 (left, top) to 1 (right, bottom).
        cond_framings: of the pictures to edit. They are cropped like the result if they have its shape, else used
            whole.
    """

    picture: int
    repeat: int
    bucket: tuple[int, int]
    centering: tuple[float, float]
    cond_framings: tuple[Framing, ...] = ()

    @property
    def framing(self) -> Framing:
        return Framing(self.bucket, self.centering)


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
    pictures: list[Picture],
    sizes: list[tuple[int, int]],
    settings: DataSettings,
    limits: SizeLimits,
    seed: int,
    cond_sizes: Sequence[Sequence[tuple[int, int]]] = (),
) -> list[Example]:
    """Makes `--repeats` examples of every picture.

    A crop depends on the seed, the picture's index and the repeat alone.

    Args:
        pictures: the pictures.
        sizes: their (height, width) in pixels.
        settings: resolution, buckets, repeats and whether to crop at the center.
        limits: sizes that the model can be trained at.
        seed: `--seed`.
        cond_sizes: (height, width) of each picture's pictures to edit. Default: there are none.

    Raises:
        InputError: a picture would be trained at a size outside the limits, or a picture to edit has one that the
            model does not take.
    """
    examples = []
    cond_sizes = cond_sizes or [()] * len(pictures)
    for index, (picture, size, own_cond_sizes) in enumerate(zip(pictures, sizes, cond_sizes, strict=True)):
        height, width = size
        bucket = bucket_for(height, width, settings, limits)
        if problem := size_problem(*bucket, limits):
            raise InputError(
                f"{picture.name}: {height}x{width} pixels fall into the bucket {bucket[0]}x{bucket[1]} at "
                f"--resolution {settings.resolution}, which is {problem} (change --resolution or the picture)"
            )
        check_cond_images(picture, own_cond_sizes, limits)
        for repeat in range(settings.repeats):
            rng = random.Random(f"{seed}/crop/{index}/{repeat}")
            position = (0.5, 0.5) if settings.center_crop else (rng.random(), rng.random())
            framing = Framing(bucket, _centering(position, size, bucket))
            cond_framings = tuple(
                framing if are_aligned(cond_size, size, bucket, limits) else whole(cond_size)
                for cond_size in own_cond_sizes
            )
            examples.append(Example(index, repeat, *framing, cond_framings))
    return examples


def check_cond_images(picture: Picture, sizes: Sequence[tuple[int, int]], limits: SizeLimits) -> None:
    """Raises `InputError` for a picture to edit whose size the model does not take."""
    for cond_image, (height, width) in zip(picture.cond_images, sizes, strict=True):
        if problem := cond_image_problem(height, width, limits):
            raise InputError(f"{cond_image.name}: {height}x{width} pixels are {problem}, or remove the row")


def are_aligned(
    cond_size: tuple[int, int], size: tuple[int, int], bucket: tuple[int, int], limits: SizeLimits
) -> bool:
    """Whether a picture to edit and the result have the same shape, up to one step between buckets.

    Args:
        cond_size, size: (height, width) in pixels of the picture to edit and of the result.
        bucket: that the result is scaled to.
    """
    scale = max(side / length for side, length in zip(bucket, size, strict=True))
    cond_scale = max(side / length for side, length in zip(bucket, cond_size, strict=True))
    differences = (abs(a * cond_scale - b * scale) for a, b in zip(cond_size, size, strict=True))
    return max(differences) <= limits.pixels_per_token


def whole(size: tuple[int, int]) -> Framing:
    """All of a picture."""
    return Framing(size, (0.5, 0.5))


def _centering(position: tuple[float, float], size: tuple[int, int], bucket: tuple[int, int]) -> tuple[float, float]:
    """The crop's (x, y) position; 0.5 along a side that is not cropped, so that equal crops are encoded only once."""
    height, width = size
    is_cut_in_width = width * bucket[0] > height * bucket[1]
    is_cut_in_height = width * bucket[0] < height * bucket[1]
    return (position[0] if is_cut_in_width else 0.5, position[1] if is_cut_in_height else 0.5)


def crop_image(image: Image.Image, framing: Framing, flip: bool) -> Image.Image:
    """Scales and crops a picture, and mirrors it if `flip` is true."""
    height, width = framing.size
    image = ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS, centering=framing.centering)
    return ImageOps.mirror(image) if flip else image
