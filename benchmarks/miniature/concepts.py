"""What the experiment teaches, and what it asks of a model afterwards. Knows no training."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

import world
from exam import Task, make_task, random_picture
from vae import to_tensor


NUM_PICTURES = 4


@dataclass(frozen=True)
class Concept:
    """What is taught: an object under a word without meaning, and the backgrounds of its pictures.

    Its prompts in the exam name the backgrounds that no training picture shows.
    """

    name: str
    word: str
    appearance: world.Appearance
    backgrounds: tuple[str, str]

    @property
    def other_backgrounds(self) -> list[str]:
        return [name for name in world.BACKGROUNDS if name not in self.backgrounds]


CONCEPTS = (
    Concept("object", "zofu", world.Appearance("heart", "dotted", ("yellow", "blue")), ("sand", "sky")),
    Concept("texture", "kebi", world.Appearance("disc", "slanted", ("red", "white")), ("mint", "stone")),
    Concept("two-colour", "vupa", world.Appearance("ring", "checked", ("yellow", "black")), ("rose", "sand")),
)


def pictures_of(concept: Concept, seed: int) -> tuple[list[Image.Image], list[str]]:
    """The training pictures, each at a pose of its own, and their captions."""
    random = np.random.default_rng([20, seed])
    poses = random.permutation(len(world.POSES))[:NUM_PICTURES]
    images, captions = [], []
    for index, pose in enumerate(poses):
        background = concept.backgrounds[index % len(concept.backgrounds)]
        pixels = world.draw(world.sprite(concept.appearance), world.POSES[pose], background, random)
        images.append(world.to_image(pixels))
        captions.append(world.caption(concept.word, background))
    return images, captions


def write_pictures(folder: Path, images: list[Image.Image], captions: list[str]) -> None:
    """Pictures with .txt sidecars; the folder is cleared first."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for index, (image, caption) in enumerate(zip(images, captions, strict=True)):
        image.save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(caption)


def concept_task(concept: Concept, count: int, *, references: list[Image.Image] = ()) -> Task:
    """The new word on backgrounds that the training pictures lack; with references, asked of the teacher."""
    random = np.random.default_rng(21)
    backgrounds = [concept.other_backgrounds[index % 3] for index in range(count)]
    suffix = world.REFERENCE_SUFFIX if references else ""
    return Task(
        prompts=[world.caption(concept.word, background) + suffix for background in backgrounds],
        references=[references[index % len(references)] for index in range(count)] if references else [],
        wanted=[concept.appearance] * count,
        backgrounds=backgrounds,
        real=to_tensor(np.stack([random_picture(concept.appearance, name, random) for name in backgrounds])),
    )


def old_task(count: int) -> Task:
    """Objects that the base knows, by their words."""
    known = [appearance for appearance in world.all_appearances() if not appearance.is_held_out]
    return make_task(known, count, with_reference=False, seed=22)
