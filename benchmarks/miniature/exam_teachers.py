"""Teachers of known kind, good and bad, by which the teacher's exam is calibrated."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageFilter

from benchmarks.miniature import world
from benchmarks.miniature.concepts import CONCEPTS, Concept, training_pictures
from benchmarks.miniature.parts import MAX_SEQUENCE_LENGTH, NUM_STEPS
from dopsd.exam.figures import Measures, Trial
from dopsd.exam.results import Exam
from dopsd.exam.verdict import BLURS, COPIES, NO_BETTER, TEACHES, ZOOMS
from dopsd.rollout import seeded_noise
from pipelines.flux2_klein import Flux2KleinDOPSDPipeline


Images = list[Image.Image]
GRAIN_SHARE = 0.7  # of a copy's new grain: what a copy by a few-step model differs in
BLUR_PIXELS = 1.0


def subjects(count: int) -> list[Concept]:
    """The experiment's concepts, and other objects that no training picture of the miniature shows."""
    rng = np.random.default_rng(30)
    held_out = world.held_out_appearances()
    found = list(CONCEPTS)
    for index in rng.permutation(len(held_out)):
        backgrounds = rng.choice(list(world.BACKGROUNDS), 2, replace=False)
        word = world.nonsense_word(rng)
        found.append(Concept(held_out[index].words, word, held_out[index], (str(backgrounds[0]), str(backgrounds[1]))))
    return found[:count]


@dataclass(frozen=True)
class Class:
    """What the teachers of one subject teach from.

    Attributes:
        pictures, captions: of the subject, which `word` stands for.
        wrong_pictures: of another subject.
        words: of objects that the base knows and the pictures do not show, one for each.
        seeds: of the noise.
    """

    pipeline: Flux2KleinDOPSDPipeline
    pictures: Images
    captions: list[str]
    word: str
    wrong_pictures: Images
    words: list[str]
    seeds: list[int]

    @property
    def others(self) -> Images:
        """The next picture of the subject for each."""
        return [*self.pictures[1:], *self.pictures[:1]]

    @property
    def renamed(self) -> list[str]:
        """The captions with another object's words."""
        return [caption.replace(self.word, words, 1) for caption, words in zip(self.captions, self.words, strict=True)]

    def latents(
        self, captions: list[str], references: Images | tuple = (), num_steps: int = NUM_STEPS
    ) -> torch.Tensor:
        """(N, C, h, w), for `pipeline.decode`."""
        options = {"max_sequence_length": MAX_SEQUENCE_LENGTH}
        if references:
            context = self.pipeline.encode_edit_teacher(captions, references, **options)
        else:
            context = self.pipeline.encode_student(captions, **options)
        noise = seeded_noise(self.pipeline.latent_shape(world.SIDE, world.SIDE), self.seeds)
        return self.pipeline.sample(context, noise, num_steps)

    def draw(self, captions: list[str], references: Images | tuple = (), num_steps: int = NUM_STEPS) -> Images:
        return self.pipeline.decode(self.latents(captions, references, num_steps))

    def taught(self, references: Images | tuple = (), num_steps: int = NUM_STEPS) -> Images:
        """By a good teacher, with the pictures or with these references."""
        prompts = [caption + world.REFERENCE_SUFFIX for caption in self.captions]
        return self.draw(prompts, references or self.pictures, num_steps)


def make_class(pipeline: Flux2KleinDOPSDPipeline, concept: Concept, wrong: Concept, seed: int) -> Class:
    rng = np.random.default_rng([31, seed])
    pictures, captions = training_pictures(concept, seed)
    known = [item.words for item in world.known_appearances() if item.colours != concept.appearance.colours]
    return Class(
        pipeline=pipeline,
        pictures=pictures,
        captions=captions,
        word=concept.word,
        wrong_pictures=training_pictures(wrong, seed)[0],
        words=[known[index] for index in rng.choice(len(known), len(pictures), replace=False)],
        seeds=[int(seed) for seed in rng.integers(2**31, size=len(pictures))],
    )


# What teachers draw


def zoomed(images: Images, scale: float) -> Images:
    """The middle of each picture enlarged, or the picture made smaller amid its border's colours."""
    found = []
    for image in images:
        side = round(image.width * scale)
        large = np.asarray(image.resize((side, side), Image.Resampling.BICUBIC))
        margin = max(0, -(-(image.width - side) // 2))
        padded = np.pad(large, ((margin, margin), (margin, margin), (0, 0)), mode="edge")
        start = (padded.shape[0] - image.width) // 2
        found.append(Image.fromarray(padded[start : start + image.width, start : start + image.width]))
    return found


def moved(images: Images, right: int, down: int) -> Images:
    return [Image.fromarray(np.roll(np.asarray(image), (down, right), (0, 1))) for image in images]


def with_grain(images: Images, seed: int = 32) -> Images:
    """Whole-picture copies: the pictures under some more grain."""
    rng = np.random.default_rng(seed)
    pixels = (np.asarray(image, np.float32) / 127.5 - 1 for image in images)
    return [world.to_image(one + GRAIN_SHARE * world.grain(rng)) for one in pixels]


def blurred(images: Images) -> Images:
    return [image.filter(ImageFilter.GaussianBlur(BLUR_PIXELS)) for image in images]


def smoothed(school: Class) -> Images:
    """Decoded from latents that are averaged over 3 x 3 elements."""
    prompts = [caption + world.REFERENCE_SUFFIX for caption in school.captions]
    latents = torch.nn.functional.avg_pool2d(
        school.latents(prompts, school.pictures), kernel_size=3, stride=1, padding=1, count_include_pad=False
    )
    return school.pipeline.decode(latents)


@dataclass(frozen=True)
class Kind:
    """A kind of teacher.

    Attributes:
        expected: the verdict that is right.
        teach: what its teachers draw.
        saw: the pictures that they saw.
        renames: whether student and teacher read the words of another object, which the base knows.
    """

    name: str
    expected: str
    teach: Callable[[Class], Images]
    saw: Callable[[Class], Images] = lambda school: school.pictures
    renames: bool = False


KINDS = (
    Kind("good", TEACHES, Class.taught),
    Kind("good, saw another picture", TEACHES, lambda one: one.taught(one.others), saw=lambda one: one.others),
    Kind("without the suffix", TEACHES, lambda one: one.draw(one.captions, one.pictures)),
    Kind("words win over the picture", NO_BETTER, lambda one: one.draw(one.renamed, one.pictures), renames=True),
    Kind("suffix names another object", NO_BETTER, lambda one: one.draw(one.renamed, one.pictures)),
    Kind(
        "saw another subject",
        NO_BETTER,
        lambda one: one.taught(one.wrong_pictures),
        saw=lambda one: one.wrong_pictures,
    ),
    Kind("pixels blurred", BLURS, lambda one: blurred(one.taught())),
    Kind("latents smoothed", BLURS, smoothed),
    Kind("drawn in one step", BLURS, lambda one: one.taught(num_steps=1)),
    Kind("zoomed by 1.2", ZOOMS, lambda one: zoomed(one.taught(), 1.2)),
    Kind("zoomed by 1.4", ZOOMS, lambda one: zoomed(one.taught(), 1.4)),
    Kind("shrunk by 0.85", ZOOMS, lambda one: zoomed(one.taught(), 0.85)),
    Kind("copy zoomed by 1.1", ZOOMS, lambda one: with_grain(zoomed(one.pictures, 1.1))),
    Kind("copy shifted by 4 pixels", ZOOMS, lambda one: with_grain(moved(one.pictures, 4, 4))),
    Kind("copies its picture", COPIES, lambda one: with_grain(one.pictures)),
    Kind("copies another picture", COPIES, lambda one: with_grain(one.others), saw=lambda one: one.others),
)


def examine(kind: Kind, school: Class) -> Exam:
    """The exam of one teacher, with a row for each picture."""
    base, seen = school.draw(school.renamed if kind.renames else school.captions), kind.saw(school)
    columns = school.captions, base, kind.teach(school), school.pictures, seen
    measures = Measures(lambda images: list(map(school.pipeline.picture_latents, images)), {})
    rows = measures.rows([Trial(*row) for row in zip(*columns, strict=True)])
    return Exam(tuple(rows), saw_other=seen is not school.pictures)
