"""What a model is asked for: a prompt, and the pictures to edit."""

import math
from dataclasses import dataclass
from os.path import isfile
from pathlib import Path

from ..errors import InputError
from ..settings import ValidationSettings
from ..sizes import SizeLimits, cond_image_problem
from .buckets import Crop, whole
from .images import decode
from .pictures import PictureFile


NUM_DEFAULT_REQUESTS = 2


@dataclass(frozen=True, slots=True)
class Request:
    """What a model is asked for.

    Attributes:
        prompt: the prompt, or the instruction.
        cond_images: the pictures to edit; none for a picture from the prompt alone.
        size: (height, width) of the result in pixels.
    """

    prompt: str
    cond_images: tuple[Crop, ...]
    size: tuple[int, int]


def editing_requests(settings: ValidationSettings, trained: list[Request], limits: SizeLimits) -> list[Request]:
    """One request for each `--validation_prompt`.

    Its pictures are from `--validation_image`. Without these, they are those of the training pairs, in turn.

    Args:
        trained: a request of each training pair, or of the first `num_trained_requests`.

    Raises:
        InputError: a picture cannot be read or edited, or there are not as many as prompts.
    """
    prompts, images = settings.validation_prompt, settings.validation_image
    if images is None:
        if prompts is None:
            return trained[:NUM_DEFAULT_REQUESTS]
        pairs = [(prompt, trained[index % len(trained)]) for index, prompt in enumerate(prompts)]
        return [Request(prompt, pair.cond_images, pair.size) for prompt, pair in pairs]
    prompts = prompts or [trained[index % len(trained)].prompt for index in range(len(images))]
    if len(images) not in (1, len(prompts)):
        raise InputError(
            f"--validation_image: got {len(images)} for {len(prompts)} of --validation_prompt; give one for each, or "
            "one for all. Several pictures of one prompt are joined by commas"
        )
    area = settings.validation_height * settings.validation_width
    read = [read_images(names, area, limits) for names in images]
    return [Request(prompt, *read[index % len(read)]) for index, prompt in enumerate(prompts)]


def num_trained_requests(settings: ValidationSettings) -> int:
    """How many requests of training pairs `editing_requests` uses at most."""
    given = settings.validation_prompt, settings.validation_image
    return max(NUM_DEFAULT_REQUESTS, *(len(some or ()) for some in given))


def read_images(names: str, area: int, limits: SizeLimits) -> tuple[tuple[Crop, ...], tuple[int, int]]:
    """The pictures whose paths are joined by commas, and the size of the result.

    The result has the first picture's shape and at most `area` pixels. The first picture is scaled to its size.

    Raises:
        InputError: a picture cannot be read, or has a size that the model does not take.
    """
    crops = []
    for name in [names] if isfile(names) else map(str.strip, names.split(",")):
        if not name:
            raise InputError(f"--validation_image {names}: names nothing beside a comma; remove the comma")
        if not isfile(name):
            raise InputError(f"--validation_image {name}: there is no such file; check the path")
        file = PictureFile(f"--validation_image {name}", Path(name))
        image, digest, _ = decode(file)
        if problem := cond_image_problem(image.height, image.width, limits):
            raise InputError(f"{file.name}: {image.height}x{image.width} pixels are {problem}")
        crops.append(Crop(file, digest, whole((image.height, image.width))))
    size = shrunk_to(crops[0].size, area, limits)
    first = Crop(crops[0].file, crops[0].digest, whole(size))
    return (first, *crops[1:]), size


def shrunk_to(size: tuple[int, int], area: int, limits: SizeLimits) -> tuple[int, int]:
    """A (height, width) of about the same shape and at most `area` pixels, both sides in whole tokens."""
    scale = min(1.0, math.sqrt(area / math.prod(size)))
    side = limits.pixels_per_token
    height, width = (max(limits.min_side, int(length * scale) // side * side) for length in size)
    return height, width
