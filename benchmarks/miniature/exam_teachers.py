"""Teachers of known kind, good and bad, by which the teacher's exam is calibrated."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageFilter

from benchmarks.miniature import world
from benchmarks.miniature.concepts import CONCEPTS, Concept, training_pictures
from benchmarks.miniature.evaluate import final_latents
from benchmarks.miniature.parts import NUM_STEPS
from dopsd.exam.figures import Measures, Trial
from dopsd.exam.results import Exam
from dopsd.exam.verdict import BLURS, COPIES, NO_BETTER, TEACHES, ZOOMS
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

    def draw(self, captions: list[str], references: Images | tuple = (), num_steps: int = NUM_STEPS) -> Images:
        options = {"references": references, "num_steps": num_steps}
        return self.pipeline.decode(final_latents(self.pipeline, captions, self.seeds, **options))

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
    captions = [caption + world.REFERENCE_SUFFIX for caption in school.captions]
    latents = final_latents(school.pipeline, captions, school.seeds, references=school.pictures)
    return school.pipeline.decode(torch.nn.functional.avg_pool2d(latents, 3, 1, 1, count_include_pad=False))


@dataclass(frozen=True)
class Kind:
    """A kind of teacher.

    Attributes:
        expected: the verdict that is right.
        teach: what its teachers draw.
        saw_other: whether they saw another picture of the subject.
        renames: whether student and teacher read the words of another object, which the base knows.
    """

    name: str
    expected: str
    teach: Callable[[Class], Images]
    saw_other: bool = False
    renames: bool = False


KINDS = (
    Kind("good", TEACHES, Class.taught),
    Kind("good, saw another picture", TEACHES, lambda school: school.taught(school.others), saw_other=True),
    Kind("without the suffix", TEACHES, lambda school: school.draw(school.captions, school.pictures)),
    Kind(
        "words win over the picture",
        NO_BETTER,
        lambda school: school.draw(school.renamed, school.pictures),
        renames=True,
    ),
    Kind("suffix names another object", NO_BETTER, lambda school: school.draw(school.renamed, school.pictures)),
    Kind("saw another subject", NO_BETTER, lambda school: school.taught(school.wrong_pictures)),
    Kind("pixels blurred", BLURS, lambda school: blurred(school.taught())),
    Kind("latents smoothed", BLURS, smoothed),
    Kind("drawn in one step", BLURS, lambda one: one.taught(num_steps=1)),
    Kind("zoomed by 1.2", ZOOMS, lambda school: zoomed(school.taught(), 1.2)),
    Kind("zoomed by 1.4", ZOOMS, lambda school: zoomed(school.taught(), 1.4)),
    Kind("shrunk by 0.85", ZOOMS, lambda school: zoomed(school.taught(), 0.85)),
    Kind("copy zoomed by 1.1", ZOOMS, lambda school: with_grain(zoomed(school.pictures, 1.1))),
    Kind("copy shifted by 4 pixels", ZOOMS, lambda school: with_grain(moved(school.pictures, 4, 4))),
    Kind("whole picture copied", COPIES, lambda school: with_grain(school.pictures)),
)


def examine(kind: Kind, school: Class) -> Exam:
    """The exam of one teacher, with a row for each picture."""
    base = school.draw(school.renamed if kind.renames else school.captions)
    seen = school.others if kind.saw_other else school.pictures
    columns = school.captions, base, kind.teach(school), school.pictures, seen
    measures = Measures(lambda images: list(map(school.pipeline.picture_latents, images)), {})
    rows = measures.rows([Trial(*row) for row in zip(*columns, strict=True)])
    return Exam(tuple(rows), saw_other=kind.saw_other)
