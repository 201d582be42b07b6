"""What the editor is taught: edits, by pairs of pictures, and an object whose pictures show more than itself."""

import json
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.miniature import world
from benchmarks.miniature.baselines import EncodedPictures, encode_pictures
from benchmarks.miniature.concepts import (
    CONCEPTS,
    NUM_PICTURES,
    Concept,
    concept_task,
    make_empty,
    old_task,
    write_pictures,
    wrong_word_task,
)
from benchmarks.miniature.edit_tasks import (
    HEART,
    SLANTED,
    Example,
    draw_example,
    edit_task,
    measure_placed,
    sources_of,
    task_of,
)
from benchmarks.miniature.edits import BLUE, PAIR_SUFFIX, Edit, known_edits, nonsense_instruction
from benchmarks.miniature.metrics import PictureReader
from benchmarks.miniature.tasks import Task
from pipelines.flux2_klein import Flux2KleinDOPSDPipeline


NUM_PAIRS = 8
# The known edits that prior preservation holds, and those that are measured.
HELD_EDITS, MEASURED_EDITS = known_edits()[::2], known_edits()[1::2]


@dataclass(frozen=True)
class EditLesson:
    """An edit that the editor does not know by words, to be taught by pairs of source and target.

    Attributes:
        word: what the new instruction makes it.
    """

    name: str
    word: str
    edit: Edit

    @property
    def instruction(self) -> str:
        return nonsense_instruction(self.word)

    @property
    def title(self) -> str:
        example = self.edit.object(self._sources[0])
        return f"{self.instruction!r}, {self._sources[0].words} -> {example.words}"

    @cached_property
    def _sources(self) -> list[world.Appearance]:
        """The objects that it changes, in a random order: the first ones are trained on."""
        sources = sources_of(self.edit)
        return [sources[index] for index in np.random.default_rng(44).permutation(len(sources))]

    def pairs(self, seed: int) -> list[Example]:
        """The training pairs."""
        rng = np.random.default_rng([45, seed])
        return [draw_example(source, self.edit, rng) for source in self._sources[:NUM_PAIRS]]

    def write_training_data(self, folder: Path, seed: int) -> None:
        """Pairs of pictures, and a metadata.jsonl that lists them with their instruction."""
        make_empty(folder)
        rows = []
        for index, pair in enumerate(self.pairs(seed)):
            row = {"file_name": f"{index}_target.png", "source_file_name": f"{index}_source.png"}
            world.to_image(pair.target).save(folder / row["file_name"])
            pair.source.save(folder / row["source_file_name"])
            rows.append(row | {"text": self.instruction})
        (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    @property
    def training_flags(self) -> dict[str, str]:
        return {
            "caption_column": "text",
            "cond_image_column": "source_file_name",
            "teacher_prompt_suffix": PAIR_SUFFIX,
        }

    def encoded_pictures(self, pipeline: Flux2KleinDOPSDPipeline, seed: int) -> EncodedPictures:
        """The training pairs for a baseline."""
        pairs = self.pairs(seed)
        both = encode_pictures(
            pipeline,
            [world.to_image(pair.target) for pair in pairs],
            [self.instruction] * len(pairs),
            prompt_suffix=PAIR_SUFFIX,
        )
        sources = torch.cat([pipeline.encode_reference(pair.source) for pair in pairs])
        return replace(
            both,
            student=both.student.with_references(sources),
            teacher=both.teacher.with_references(sources, *both.teacher.references),
        )

    def new_task(self, count: int, *, with_target: bool = False) -> Task:
        """New sources, at any place on any background."""
        rng = np.random.default_rng(46)
        sources = self._sources[NUM_PAIRS:]
        examples = [draw_example(sources[rng.integers(len(sources))], self.edit, rng) for _ in range(count)]
        return task_of(examples, [self.instruction] * count, with_target=with_target)

    def tasks(self, count: int, seed: int) -> dict[str, Task]:
        """ "new", and what should stay: `MEASURED_EDITS` ("edits"), "old" prompts without pictures; and
        "wrong_words", instructions with another word and the taught edit's result as "wanted": none should show it.
        """
        rng = np.random.default_rng(47)
        words = [world.nonsense_word(rng) for _ in range(count)]
        new = self.new_task(count)
        wrong = [nonsense_instruction(word if word != self.word else "mip") for word in words]
        return {
            "new": new,
            "edits": edit_task(MEASURED_EDITS, count, seed=8),
            "old": old_task(count),
            "wrong_words": replace(new, prompts=wrong),
        }

    def teacher_tasks(self, count: int, seed: int, suffix: str) -> dict[str, Task]:
        """The new sources with their results and the suffix that every teacher of this lesson gets."""
        return {"new": self.new_task(count, with_target=True)}

    def measure(self, pictures: torch.Tensor, task: Task, seed: int, reader: PictureReader) -> dict[str, float]:
        return measure_placed(pictures, task, reader)


EDIT_LESSONS = (
    EditLesson("blue", "blue", BLUE),
    EditLesson("heart", "zofu", HEART),
    EditLesson("slanted", "kebi", SLANTED),
)


@dataclass(frozen=True)
class LeakLesson:
    """An object to be taught whose training pictures have something else in common.

    Attributes:
        concept: the object.
        backgrounds: of the training pictures, in turn. Each background has a place of its own if there are two of
            them; on a single one, the pictures are at two places.
    """

    name: str
    concept: Concept
    backgrounds: tuple[str, ...]

    @property
    def word(self) -> str:
        return self.concept.word

    @property
    def title(self) -> str:
        places = "at two places" if len(self.backgrounds) == 1 else "at one place on each"
        return f"{NUM_PICTURES} pictures on {' and '.join(self.backgrounds)}, {places}"

    def poses(self, seed: int) -> tuple[int, int]:
        """The two places of the training pictures, indices into `world.POSES`."""
        first, second = np.random.default_rng([48, seed]).permutation(len(world.POSES))[:2]
        return int(first), int(second)

    def pictures(self, seed: int) -> tuple[list[Image.Image], list[str]]:
        """The training pictures and their captions."""
        rng = np.random.default_rng([49, seed])
        images, captions = [], []
        for index in range(NUM_PICTURES):
            background = self.backgrounds[index % len(self.backgrounds)]
            pose = world.POSES[self.poses(seed)[index % 2]]
            images.append(world.to_image(world.draw(world.sprite(self.concept.appearance), pose, background, rng)))
            captions.append(world.caption(self.word, background))
        return images, captions

    def write_training_data(self, folder: Path, seed: int) -> None:
        write_pictures(folder, *self.pictures(seed))

    @property
    def training_flags(self) -> dict[str, bool]:
        """Methods differ in what the teacher sees, and some teachers would fail their exam."""
        return {"ignore_exam": True}

    def encoded_pictures(self, pipeline: Flux2KleinDOPSDPipeline, seed: int) -> EncodedPictures:
        return encode_pictures(
            pipeline,
            *self.pictures(seed),
            prompt_suffix=world.REFERENCE_SUFFIX,
        )

    def seen_task(self, count: int) -> Task:
        """Prompts on the training pictures' own backgrounds."""
        asked = [self.backgrounds[index % len(self.backgrounds)] for index in range(count)]
        return replace(
            concept_task(self.concept, count),
            prompts=[world.caption(self.word, background) for background in asked],
            backgrounds=asked,
        )

    def tasks(self, count: int, seed: int) -> dict[str, Task]:
        """ "new", on backgrounds that no training picture shows; "seen", on theirs; "old" prompts; "wrong_words"."""
        return {
            "new": concept_task(self.concept, count),
            "seen": self.seen_task(count),
            "old": old_task(count),
            "wrong_words": wrong_word_task(self.concept, count),
        }

    def teacher_tasks(self, count: int, seed: int, suffix: str) -> dict[str, Task]:
        """The new prompts with the suffix, and with a training picture each."""
        images, _ = self.pictures(seed)
        task = concept_task(self.concept, count)
        return {
            "new": replace(
                task,
                prompts=[prompt + suffix for prompt in task.prompts],
                references=[images[index % len(images)] for index in range(count)],
            )
        }

    def measure(self, pictures: torch.Tensor, task: Task, seed: int, reader: PictureReader) -> dict[str, float]:
        """`measure_placed`, and the shares of pictures at one of the training pictures' places ("trained_places"), and
        at the place that they have on the picture's background ("own_place", if there are two backgrounds).
        """
        figures = measure_placed(pictures, task, reader)
        poses, asked = reader.read(pictures).poses.tolist(), task.backgrounds
        trained = self.poses(seed)
        figures["trained_places"] = round(float(np.mean([pose in trained for pose in poses])), 3)
        if len(self.backgrounds) == len(trained) and {*asked} <= {*self.backgrounds}:
            own = [trained[self.backgrounds.index(name)] for name in asked]
            figures["own_place"] = round(float(np.mean([a == b for a, b in zip(poses, own, strict=True)])), 3)
        return figures


LEAK_LESSONS = (
    LeakLesson("one-background", CONCEPTS[0], ("sand",)),
    LeakLesson("own-places", CONCEPTS[0], ("sand", "sky")),
)
