"""The concepts that the experiment teaches, their training pictures, and the tasks that test them."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.miniature import world
from benchmarks.miniature.tasks import Task, make_task, random_picture


NUM_PICTURES = 4


@dataclass(frozen=True)
class Concept:
    """An object to be taught under a nonsense word.

    Attributes:
        backgrounds: of its training pictures. Its task asks for the other ones.
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


def training_pictures(concept: Concept, seed: int) -> tuple[list[Image.Image], list[str]]:
    """The training pictures, each at a different pose, and their captions."""
    rng = np.random.default_rng([20, seed])
    poses = rng.permutation(len(world.POSES))[:NUM_PICTURES]
    images, captions = [], []
    for index, pose in enumerate(poses):
        background = concept.backgrounds[index % len(concept.backgrounds)]
        pixels = world.draw(world.sprite(concept.appearance), world.POSES[pose], background, rng)
        images.append(world.to_image(pixels))
        captions.append(world.caption(concept.word, background))
    return images, captions


def write_pictures(folder: Path, images: list[Image.Image], captions: list[str]) -> None:
    """Writes pictures with their captions in .txt files of the same name. Deletes the folder's content first."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for index, (image, caption) in enumerate(zip(images, captions, strict=True)):
        image.save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(caption)


def concept_task(concept: Concept, count: int, *, references: Sequence[Image.Image] = ()) -> Task:
    """Prompts for the concept on backgrounds that no training picture shows.

    Args:
        references: given in turn to the prompts, which then ask for them, as the teacher's do. Empty: no references.
    """
    rng = np.random.default_rng(21)
    others = concept.other_backgrounds
    backgrounds = [others[index % len(others)] for index in range(count)]
    suffix = world.REFERENCE_SUFFIX if references else ""
    return Task(
        prompts=[world.caption(concept.word, background) + suffix for background in backgrounds],
        references=[references[index % len(references)] for index in range(count)] if references else [],
        wanted=[concept.appearance] * count,
        backgrounds=backgrounds,
        real=world.to_tensor([random_picture(concept.appearance, name, rng) for name in backgrounds]),
    )


def old_task(count: int) -> Task:
    """Prompts for objects that the base model knows, by their words."""
    return make_task(world.known_appearances(), count, with_reference=False, seed=22)
