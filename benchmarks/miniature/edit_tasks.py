"""Tasks of the editor: pictures to edit, pairs, pictures to copy, and what is wanted."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from benchmarks.miniature import world
from benchmarks.miniature.edits import (
    BACKGROUND,
    BLUE,
    COPY_SUFFIX,
    PAIR_SUFFIX,
    SHAPE,
    TEXTURE,
    Edit,
    known_edits,
    nonsense_instruction,
)
from benchmarks.miniature.evaluate import measure, sample
from benchmarks.miniature.metrics import PictureReader
from benchmarks.miniature.tasks import Task, standard_tasks
from pipelines.flux2_klein import Flux2KleinDOPSDPipeline


@dataclass(frozen=True)
class PlacedTask(Task):
    """A task whose pictures have a right place as well.

    Attributes:
        poses: indices into `world.POSES`.
    """

    poses: list[int]


@dataclass(frozen=True)
class Example:
    """A picture before and after an edit.

    Attributes:
        pose: index into `world.POSES`.
        source, target: with grain.
    """

    edit: Edit
    wanted: world.Appearance
    pose: int
    background: str
    source: Image.Image
    target: np.ndarray


def draw_example(before: world.Appearance, edit: Edit, rng: np.random.Generator) -> Example:
    """A random picture of the object, before and after the edit."""
    pose = int(rng.integers(len(world.POSES)))
    background = str(rng.choice([name for name in world.BACKGROUNDS if edit.kind != BACKGROUND or name != edit.value]))
    after = edit.object(before)
    source = world.draw(world.sprite(before), world.POSES[pose], background, rng)
    target = world.draw(world.sprite(after), world.POSES[pose], edit.background(background), rng)
    return Example(edit, after, pose, edit.background(background), world.to_image(source), target)


def sources_of(edit: Edit, *, is_held_out: bool = False) -> list[world.Appearance]:
    """The objects that an edit changes and whose shape and texture have a name in captions.

    Args:
        is_held_out: take those that no training row shows before or after the edit; else those that rows can show.
    """
    named = [
        item
        for item in world.all_appearances()
        if item.shape != world.HELD_OUT_SHAPE and item.texture != world.HELD_OUT_TEXTURE and edit.applies_to(item)
    ]
    # With these, no result is one that rows show.
    is_new = edit.value in (world.HELD_OUT_SHAPE, world.HELD_OUT_TEXTURE)

    def held_out(item: world.Appearance) -> bool:
        return item.is_held_out or (not is_new and edit.object(item).is_held_out)

    return [item for item in named if held_out(item) == is_held_out]


def edit_task(
    edits: Sequence[Edit],
    count: int,
    *,
    seed: int,
    is_held_out: bool = False,
    instruction: Callable[[Edit], str] = lambda edit: edit.instruction,
    with_target: bool = False,
) -> PlacedTask:
    """Random sources and edits.

    Args:
        is_held_out: see `sources_of`.
        instruction: gives an edit's words.
        with_target: adds the result as the last picture, as the teacher sees it, and `PAIR_SUFFIX`.
    """
    rng = np.random.default_rng([41, seed])
    examples = []
    for _ in range(count):
        edit = edits[rng.integers(len(edits))]
        sources = sources_of(edit, is_held_out=is_held_out)
        examples.append(draw_example(sources[rng.integers(len(sources))], edit, rng))
    return task_of(examples, [instruction(example.edit) for example in examples], with_target=with_target)


def task_of(examples: list[Example], instructions: list[str], *, with_target: bool) -> PlacedTask:
    suffix = PAIR_SUFFIX if with_target else ""
    return PlacedTask(
        prompts=[instruction + suffix for instruction in instructions],
        references=[
            (example.source, world.to_image(example.target)) if with_target else example.source for example in examples
        ],
        wanted=[example.wanted for example in examples],
        backgrounds=[example.background for example in examples],
        real=world.to_tensor([example.target for example in examples]),
        poses=[example.pose for example in examples],
    )


def copy_task(count: int, *, seed: int, suffix: str = COPY_SUFFIX) -> PlacedTask:
    """Captions with a nonsense word, each with a picture of a known object on a background that it does not name."""
    rng = np.random.default_rng([42, seed])
    known = world.known_appearances()
    wanted, backgrounds, poses, prompts, references, real = [], [], [], [], [], []
    for _ in range(count):
        appearance, pose = known[rng.integers(len(known))], int(rng.integers(len(world.POSES)))
        shown, asked = (str(name) for name in rng.choice(list(world.BACKGROUNDS), 2, replace=False))
        wanted.append(appearance)
        poses.append(pose)
        backgrounds.append(shown)
        prompts.append(world.caption(world.nonsense_word(rng), asked) + suffix)
        picture = world.draw(world.sprite(appearance), world.POSES[pose], shown, rng)
        references.append(world.to_image(picture))
        real.append(picture)
    return PlacedTask(prompts, references, wanted, backgrounds, world.to_tensor(real), poses)


SLANTED, HEART = Edit(TEXTURE, world.HELD_OUT_TEXTURE), Edit(SHAPE, world.HELD_OUT_SHAPE)


def editor_tasks(count: int) -> dict[str, Task]:
    """The tasks of `standard_tasks`, and those that only an editor knows."""
    return standard_tasks(count) | {
        "edit_seen": edit_task(known_edits(), count, seed=1),
        "edit_unseen": edit_task(known_edits(), count, seed=2, is_held_out=True),
        "edit_blue": edit_task([BLUE], count, seed=3),
        "pair": edit_task(known_edits(), count, seed=4, with_target=True),
        "pair_blue": edit_task([BLUE], count, seed=5, with_target=True),
        "pair_nonsense": edit_task(
            [SLANTED], count, seed=6, with_target=True, instruction=lambda _: nonsense_instruction("zofu")
        ),
        "copy": copy_task(count, seed=7),
    }


def measure_placed(pictures: torch.Tensor, task: Task, reader: PictureReader) -> dict[str, float]:
    """`measure`; for a `PlacedTask` also the shares of pictures with the right place ("place"), and with the right
    object, background and place ("whole").
    """
    figures = measure(pictures, task, reader)
    if isinstance(task, PlacedTask):
        reading = reader.read(pictures)
        is_placed = reading.poses == torch.tensor(task.poses)
        names = list(world.BACKGROUNDS)
        is_right = torch.tensor(
            [
                reader.appearances[index] == wanted and names[background] == wanted_background
                for index, wanted, background, wanted_background in zip(
                    reading.objects, task.wanted, reading.backgrounds, task.backgrounds, strict=True
                )
            ]
        )
        for name, is_so in (("place", is_placed), ("whole", is_placed & is_right)):
            figures[name] = round(float(is_so.float().mean()), 3)
    return figures


def measure_task(pipeline: Flux2KleinDOPSDPipeline, task: Task, reader: PictureReader) -> dict[str, float]:
    return measure_placed(sample(pipeline, task), task, reader)
