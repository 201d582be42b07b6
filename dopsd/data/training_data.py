"""The training data of a run: pictures with captions, the examples cropped from them, and their order."""

import math
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path

from accelerate import Accelerator
from accelerate.logging import get_logger
from PIL import Image

from ..errors import InputError
from ..findings import Findings
from ..settings import Settings
from ..sharing import failing_together, share_on_each_machine
from ..sizes import SizeLimits
from ..text import printable
from .buckets import Crop, Example, plan_examples
from .checking import CheckedPicture, check_pictures, warn_of_profiles
from .images import decode
from .order import Sample, SampleOrder
from .pictures import Picture
from .requests import Request, editing_requests, num_trained_requests
from .sources import read_pictures


logger = get_logger(__name__)

NUM_DEFAULT_VALIDATION_PROMPTS = 2


@dataclass
class TrainingData:
    """Pictures, examples and their order.

    Attributes:
        pictures: sorted by path, or in row order.
        digests: SHA-256 of each picture's file; "" for captions without a picture.
        examples: each repeat of each picture, with its bucket and crop.
        order: the micro-batches of the run.
        cond_digests: SHA-256 of each picture's pictures to edit.
        editing_requests: what an editor is validated on.
    """

    pictures: list[Picture]
    digests: list[str]
    examples: list[Example]
    order: SampleOrder
    cond_digests: list[tuple[str, ...]] = field(default_factory=list)
    editing_requests: list[Request] = field(default_factory=list)
    _last_image: tuple[str, Image.Image] | None = field(default=None, repr=False)  # decoded last, with its digest

    def __post_init__(self) -> None:
        self.cond_digests = self.cond_digests or [()] * len(self.pictures)

    @cached_property
    def is_editing(self) -> bool:
        """Whether the pictures are results of edits. Asked for each micro-batch, of all pictures."""
        return any(picture.cond_images for picture in self.pictures)

    @property
    def captions(self) -> list[str]:
        """Distinct captions, in order."""
        return list(dict.fromkeys(caption for picture in self.pictures for caption in picture.captions))

    def pictures_per_step(self, settings: Settings, num_processes: int) -> float:
        """Pictures per optimizer step over all processes, on average."""
        return self.order.mean_batch_size * settings.training.gradient_accumulation_steps * num_processes

    def picture(self, sample: Sample) -> Picture:
        return self.pictures[self.examples[sample.example].picture]

    def caption(self, sample: Sample) -> str:
        return self.picture(sample).captions[sample.caption]

    def bucket(self, sample: Sample) -> tuple[int, int]:
        """(height, width) in pixels."""
        return self.examples[sample.example].bucket

    def shown(self, count: int) -> list[Sample]:
        """A sample of each of the first `count` pictures, for sheets; of each group in turn if there are groups."""
        firsts: dict[int, int] = {}  # picture -> example
        for index, example in enumerate(self.examples):
            firsts.setdefault(example.picture, index)
        chosen = sorted(firsts.values())
        if any(self.order.partners):
            places = Counter()
            place_of = {}
            for index in chosen:
                group = self.pictures[self.examples[index].picture].group
                place_of[index] = places[group]
                places[group] += 1
            chosen.sort(key=place_of.get)
        return [next(self.order.variants(index)) for index in chosen[:count]]

    def request(self, sample: Sample) -> Request:
        """What the student is asked for."""
        return Request(self.caption(sample), self.cond_crops(sample), self.bucket(sample))

    # A sample's pictures

    def crop(self, sample: Sample) -> Crop:
        """The training picture."""
        return self._crop(sample.example, sample.flip)

    def teacher_crop(self, sample: Sample) -> Crop:
        """The picture that the teacher sees besides those to edit."""
        return self._crop(sample.example if sample.partner is None else sample.partner, sample.flip)

    def cond_crops(self, sample: Sample) -> tuple[Crop, ...]:
        """The pictures to edit."""
        example = self.examples[sample.example]
        if not example.cond_framings:
            return ()
        files, digests = self.pictures[example.picture].cond_images, self.cond_digests[example.picture]
        return tuple(Crop(*one, sample.flip) for one in zip(files, digests, example.cond_framings, strict=True))

    def _crop(self, index: int, flip: bool) -> Crop:
        example = self.examples[index]
        return Crop(self.pictures[example.picture].file, self.digests[example.picture], example.framing, flip)

    def pixels(self, crop: Crop) -> Image.Image | None:
        """The crop's pixels; None if the caption has no picture.

        Raises:
            InputError: the picture cannot be read any more, or is another one than at the start.
        """
        if crop.file.source is None:
            return None
        if self._last_image is None or self._last_image[0] != crop.digest:
            image, digest, _ = decode(crop.file)
            if digest != crop.digest:
                raise InputError(
                    f"{crop.file.name}: has changed since it was checked; save it again, then start again"
                )
            self._last_image = digest, image
        return crop.apply(self._last_image[1])


def load_training_data(settings: Settings, limits: SizeLimits, accelerator: Accelerator) -> TrainingData:
    """Reads captions, checks the pictures, and plans crops and order.

    Every picture is read and decoded once on each machine, by one of its processes, unless an earlier run with this
    context cache has done so.

    Args:
        settings: with a seed.

    Raises:
        InputError: a picture, a caption or a flag cannot be used. If it is one process's, all raise it.
    """
    data, training = settings.data, settings.training
    pictures = read_pictures(
        data,
        accelerator,
        teacher_caption_column=settings.teacher.teacher_caption_column,
        cache_dir=settings.model.cache_dir,
    )
    # Several pictures may be edited versions of the same one, which is read once.
    cond_files = list(dict.fromkeys(file for picture in pictures for file in picture.cond_images))
    files = [*(picture.file for picture in pictures), *cond_files]
    check = partial(
        check_pictures,
        resolution=data.resolution,
        disable_progress=not accelerator.is_local_main_process,
        findings=picture_findings(settings),
    )
    checked, *others = share_on_each_machine(check, files, accelerator)
    if any(other != checked for other in others):
        source = f"--instance_data_dir {data.instance_data_dir}"
        if data.instance_data_dir is None:
            source = f"--dataset_name {data.dataset_name}"
        raise InputError(f"{source}: the pictures differ between the machines of this run; copy the same ones to each")
    warn_of_profiles(files, checked)
    checked_of = dict(zip(cond_files, checked[len(pictures) :], strict=True))
    cond_images = [[checked_of[file] for file in picture.cond_images] for picture in pictures]
    examples = plan_examples(
        pictures,
        [shape_of(*pair) for pair in zip(pictures, checked[: len(pictures)], cond_images, strict=True)],
        data,
        limits,
        training.seed,
        [[one.size for one in own] for own in cond_images],
    )
    warn_of_misaligned(pictures, examples)
    digests = [picture.digest for picture in checked[: len(pictures)]]
    order = SampleOrder(
        pictures,
        examples,
        batch_size=training.train_batch_size,
        random_flip=data.random_flip,
        seed=training.seed,
        digests=digests if settings.teacher.teacher_picture == "other" else None,
    )
    read = TrainingData(pictures, digests, examples, order, [tuple(one.digest for one in own) for own in cond_images])
    if read.is_editing and settings.validation.validation_steps > 0:
        with failing_together():
            count = num_trained_requests(settings.validation)
            trained = [read.request(sample) for sample in read.shown(count)]
            read.editing_requests = editing_requests(settings.validation, trained, limits)
    return read


def picture_findings(settings: Settings) -> Findings:
    """What earlier runs have found out about pictures. They are kept with the encodings."""
    training = settings.training
    keeps = not training.no_context_cache and not settings.performance.dry_run
    return Findings(Path(training.context_cache_dir) / "pictures" if keeps else None)


def shape_of(picture: Picture, checked: CheckedPicture, cond_images: list[CheckedPicture]) -> tuple[int, int]:
    """(height, width) in pixels of a picture; if there is only an instruction, those of the picture to edit."""
    return cond_images[0].size if picture.source is None and cond_images else checked.size


def warn_of_misaligned(pictures: list[Picture], examples: list[Example]) -> None:
    """Warns once of all pictures that have another shape than what they are edited from."""
    misaligned = {
        example.picture: example
        for example in examples
        if example.cond_framings and example.framing not in example.cond_framings
    }
    if not misaligned:
        return
    index, example = next(iter(misaligned.items()))
    (height, width), (cond_height, cond_width) = example.bucket, example.cond_framings[0].size
    num_pairs = sum(bool(picture.cond_images) for picture in pictures)
    logger.warning(
        f"{printable(pictures[index].name)}: the picture to edit is {cond_height}x{cond_width} pixels and has another "
        f"shape than the result, {height}x{width} in training; so it is in {len(misaligned)} of {num_pairs} pairs. "
        "From such pairs the model may learn to zoom or to shift: crop both pictures alike"
    )


def resolve_data_defaults(settings: Settings, data: TrainingData, num_processes: int) -> Settings:
    """Fills in the defaults that follow from the data: number of steps, validation prompts."""
    training, validation = settings.training, settings.validation
    num_steps = training.max_train_steps
    if num_steps is None:
        batches_per_step = num_processes * training.gradient_accumulation_steps
        num_steps = math.ceil(training.num_train_epochs * data.order.num_batches / batches_per_step)
    prompts = validation.validation_prompt or data.captions[:NUM_DEFAULT_VALIDATION_PROMPTS]
    if data.editing_requests:
        prompts = [request.prompt for request in data.editing_requests]
    return settings.replace(max_train_steps=num_steps, validation_prompt=prompts)
