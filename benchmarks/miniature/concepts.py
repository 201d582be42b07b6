"""The concepts that the experiment teaches, their training pictures, and the tasks that test them."""

import json
import shutil
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.miniature import world
from benchmarks.miniature.tasks import Task, make_task, random_picture


NUM_PICTURES = 4
NUM_RENAMED = 8  # captions that teach a renaming
NUM_PRIOR_PROMPTS = 50
MAX_EVAL_COUNT = 192  # pictures per task; prior preservation must not know what the tasks ask for
PARTS = ("shape", "texture", "colours")


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

    @property
    def neighbours(self) -> list[world.Appearance]:
        """Known objects that differ from it in only one of shape, texture and colours."""
        return [
            known
            for known in world.known_appearances()
            if sum(getattr(known, part) != getattr(self.appearance, part) for part in PARTS) == 1
        ]

    def pictures(self, seed: int) -> tuple[list[Image.Image], list[str]]:
        """The training pictures and their captions."""
        return training_pictures(self, seed)

    def write_training_data(self, folder: Path, seed: int) -> None:
        write_pictures(folder, *self.pictures(seed))

    @property
    def training_flags(self) -> dict[str, str]:
        """Flags of the training script that its training data need."""
        return {"teacher_prompt_suffix": world.REFERENCE_SUFFIX}

    def task(self, count: int) -> Task:
        return concept_task(self, count)


@dataclass(frozen=True)
class Renaming:
    """A known word that is to mean something else: a lesson that prior preservation resists. Captions alone teach it.

    Attributes:
        word: a texture. It is to mean `meaning`, another texture.
    """

    name: str
    word: str
    meaning: str

    @property
    def objects(self) -> list[world.Appearance]:
        """Known objects of the texture `word`, whose counterparts are known too; the first ones are trained on."""
        known = [item for item in world.known_appearances() if item.texture == self.word]
        known = [item for item in known if not self.renamed(item).is_held_out]
        return [known[index] for index in np.random.default_rng(24).permutation(len(known))]

    def renamed(self, appearance: world.Appearance) -> world.Appearance:
        return replace(appearance, texture=self.meaning)

    @property
    def neighbours(self) -> list[world.Appearance]:
        return [item for item in world.known_appearances() if item.texture != self.word]

    def write_training_data(self, folder: Path, seed: int) -> None:
        """Captions without pictures: the student's, and the teacher's, which says what is meant."""
        rng = np.random.default_rng([25, seed])
        rows = []
        for appearance in self.objects[:NUM_RENAMED]:
            background = world.random_background(rng)
            short = world.caption(appearance.words, background)
            rows.append({"short": short, "long": world.caption(self.renamed(appearance).words, background)})
        make_empty(folder)
        (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    @property
    def training_flags(self) -> dict[str, str]:
        return {"caption_column": "short", "teacher_context": "caption", "teacher_caption_column": "long"}

    def task(self, count: int) -> Task:
        """Prompts with the word for objects that are not trained on."""
        task = make_task(self.objects[NUM_RENAMED:], count, with_reference=False, seed=26)
        return replace(task, wanted=[self.renamed(appearance) for appearance in task.wanted])


CONCEPTS = (
    Concept("object", "zofu", world.Appearance("heart", "dotted", ("yellow", "blue")), ("sand", "sky")),
    Concept("texture", "kebi", world.Appearance("disc", "slanted", ("red", "white")), ("mint", "stone")),
    Concept("two-colour", "vupa", world.Appearance("ring", "checked", ("yellow", "black")), ("rose", "sand")),
)

RENAMING = Renaming("renaming", "dotted", "checked")


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
    make_empty(folder)
    for index, (image, caption) in enumerate(zip(images, captions, strict=True)):
        image.save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(caption)


def make_empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


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


def neighbour_task(concept: Concept | Renaming, count: int) -> Task:
    """Prompts for known objects that are like the concept, by their words."""
    return make_task(concept.neighbours, count, with_reference=False, seed=27)


def wrong_word_task(concept: Concept, count: int) -> Task:
    """Prompts with made-up words that are not the concept's, and as "wanted" the concept: none should show it."""
    rng = np.random.default_rng(28)
    taught = {other.word for other in CONCEPTS}
    words = [word for word in (world.nonsense_word(rng) for _ in range(2 * count)) if word not in taught][:count]
    backgrounds = [world.random_background(rng) for _ in words]
    return Task(
        prompts=[world.caption(word, background) for word, background in zip(words, backgrounds, strict=True)],
        references=[],
        wanted=[concept.appearance] * count,
        backgrounds=backgrounds,
        real=world.to_tensor([random_picture(concept.appearance, name, rng) for name in backgrounds]),
    )


def unasked_appearances() -> list[world.Appearance]:
    """The known objects that no task of a concept asks for."""
    asked = {*old_task(MAX_EVAL_COUNT).wanted, *(item for concept in CONCEPTS for item in concept.neighbours)}
    return [item for item in world.known_appearances() if item not in asked]


def prior_prompts(avoids: Collection[str] = ()) -> list[str]:
    """Prompts for prior preservation: known objects that no task of a concept asks for.

    Args:
        avoids: words that no prompt has.
    """
    unasked = [item for item in unasked_appearances() if not {*item.words.split()} & {*avoids}]
    rng = np.random.default_rng(29)
    chosen = rng.choice(len(unasked), NUM_PRIOR_PROMPTS, replace=False)
    return [world.caption(unasked[index].words, world.random_background(rng)) for index in chosen]
