"""The training data of a run: pictures with captions, the examples cropped from them, and their order."""

import math
from dataclasses import dataclass, field
from functools import partial

from accelerate import Accelerator
from PIL import Image

from ..errors import InputError
from ..settings import Settings
from ..sharing import failing_together, share_on_each_machine
from ..sizes import SizeLimits
from .buckets import Example, crop_image, plan_examples
from .images import check_pictures, read_image, warn_of_profiles
from .order import Sample, SampleOrder
from .pictures import Picture
from .sources import read_pictures


NUM_DEFAULT_VALIDATION_PROMPTS = 2


@dataclass(frozen=True)
class Crop:
    """The crop of one example, possibly mirrored."""

    example: int  # index into the examples
    flip: bool


@dataclass
class TrainingData:
    """Pictures, examples and their order.

    Attributes:
        pictures: sorted by path, or in row order.
        digests: SHA-256 of each picture's file; "" for captions without a picture.
        examples: each repeat of each picture, with its bucket and crop.
        order: the micro-batches of the run.
    """

    pictures: list[Picture]
    digests: list[str]
    examples: list[Example]
    order: SampleOrder
    _last_image: tuple[int, Image.Image] | None = field(default=None, repr=False)  # decoded last, with its index

    @property
    def captions(self) -> list[str]:
        """Distinct captions, in order."""
        return list(dict.fromkeys(caption for picture in self.pictures for caption in picture.captions))

    def pictures_per_step(self, settings: Settings, num_processes: int) -> float:
        """Pictures per optimizer step over all processes, on average."""
        return self.order.mean_batch_size * settings.training.gradient_accumulation_steps * num_processes

    def picture(self, sample: Sample | Crop) -> Picture:
        return self.pictures[self.examples[sample.example].picture]

    def caption(self, sample: Sample) -> str:
        return self.picture(sample).captions[sample.caption]

    def bucket(self, sample: Sample | Crop) -> tuple[int, int]:
        """(height, width) in pixels."""
        return self.examples[sample.example].bucket

    def cropped(self, crop: Crop) -> Image.Image | None:
        """The crop's pixels at its bucket's size; None if the caption has no picture."""
        example = self.examples[crop.example]
        if self.pictures[example.picture].source is None:
            return None
        if self._last_image is None or self._last_image[0] != example.picture:
            self._last_image = example.picture, read_image(self.pictures[example.picture])
        return crop_image(self._last_image[1], example, crop.flip)


def load_training_data(settings: Settings, limits: SizeLimits, accelerator: Accelerator) -> TrainingData:
    """Reads captions, checks the pictures, and plans crops and order.

    Every picture is read and decoded once on each machine, by one of its processes.

    Args:
        settings: with a seed.

    Raises:
        InputError: a picture, a caption or a flag cannot be used. If it is one process's, all raise it.
    """
    data, training = settings.data, settings.training
    with failing_together():
        pictures = read_pictures(
            data,
            teacher_caption_column=settings.teacher.teacher_caption_column,
            cache_dir=settings.model.cache_dir,
        )
    check = partial(check_pictures, resolution=data.resolution, disable_progress=not accelerator.is_local_main_process)
    checked, *others = share_on_each_machine(check, pictures, accelerator)
    if any(other != checked for other in others):
        source = f"--instance_data_dir {data.instance_data_dir}"
        if data.instance_data_dir is None:
            source = f"--dataset_name {data.dataset_name}"
        raise InputError(f"{source}: the pictures differ between the machines of this run; copy the same ones to each")
    warn_of_profiles(pictures, checked)
    examples = plan_examples(pictures, [picture.size for picture in checked], data, limits, training.seed)
    order = SampleOrder(
        pictures,
        examples,
        batch_size=training.train_batch_size,
        random_flip=data.random_flip,
        seed=training.seed,
    )
    return TrainingData(pictures, [picture.digest for picture in checked], examples, order)


def resolve_data_defaults(settings: Settings, data: TrainingData, num_processes: int) -> Settings:
    """Fills in the defaults that follow from the data: number of steps, validation prompts."""
    training, validation = settings.training, settings.validation
    num_steps = training.max_train_steps
    if num_steps is None:
        batches_per_step = num_processes * training.gradient_accumulation_steps
        num_steps = math.ceil(training.num_train_epochs * data.order.num_batches / batches_per_step)
    return settings.replace(
        max_train_steps=num_steps,
        validation_prompt=validation.validation_prompt or data.captions[:NUM_DEFAULT_VALIDATION_PROMPTS],
    )
