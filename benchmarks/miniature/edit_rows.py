"""Training rows of the editor: edits of a picture, pairs whose last picture is the result, copies of a picture."""

from dataclasses import dataclass

import numpy as np
import torch

from benchmarks.miniature import world
from benchmarks.miniature.distill import RolloutBuffer, make_buffers
from benchmarks.miniature.edits import (
    BACKGROUND,
    BLUE,
    COPY_SUFFIX,
    PAIR_SUFFIX,
    Edit,
    NamelessEdits,
    known_edits,
    nonsense_instruction,
)
from benchmarks.miniature.klein import KLEIN
from benchmarks.miniature.rows import ROW_KINDS, Rows, RowSource
from benchmarks.miniature.teacher import PosteriorTeacher
from benchmarks.miniature.vae import encode


EDIT_KINDS = ("edit", "pair", "copy")
# Share of the edits that edit an object with a name.
NAMED_SHARE = 0.6
# Share of the instructions without a meaning, which leave the picture as it is. Half of them have a nonsense word. The
# others are `BLUE`'s: if no row asked for it, the editor would do it at once, like the other colours.
NONSENSE_SHARE = 0.1
# Of the pairs: those whose target is an edit of the source, not just another object; those of them whose instruction
# says which; those whose target has the source's place and, if it is another object, the source's background.
EDITED_SHARE, SAID_SHARE, SAME_PLACE_SHARE, SAME_BACKGROUND_SHARE = 0.5, 0.6, 0.8, 0.7


@dataclass(frozen=True)
class Scene:
    """A picture: an object, its place and its background."""

    sprite: np.ndarray
    pose: tuple[int, int]
    background: str

    def draw(self, rng: np.random.Generator | None = None) -> np.ndarray:
        """(64, 64, 3), with grain from `rng` or without."""
        return world.draw(self.sprite, self.pose, self.background, rng)


class EditorRowSource(RowSource):
    """Draws the rows of `RowSource` and those of `EDIT_KINDS`, which allow a single picture each.

    Args:
        nameless: edits of objects without a name. Those of the held-out colour are used in pairs only.
    """

    def __init__(self, *args, nameless: NamelessEdits):
        super().__init__(KLEIN, *args)
        self.nameless = nameless
        self.known_edits, self.every_edit = known_edits(), [*known_edits(), BLUE]

    def draw(self, kind: str, count: int, rng: np.random.Generator) -> Rows:
        """`count` new rows at sigma = 1.

        Args:
            kind: as in `RowSource.draw`, or "edit": an instruction and the picture to edit. "pair": an instruction,
                the picture to edit and, last, the result, which counts whatever the instruction says. "copy": any
                caption and a picture to be drawn again.
        """
        if kind in ROW_KINDS:
            return super().draw(kind, count, rng)
        draw_row = {"edit": self._edit, "pair": self._pair, "copy": self._copy}[kind]
        prompts, scenes, targets = zip(*(draw_row(rng) for _ in range(count)), strict=True)
        references = [world.to_tensor([scene.draw(rng) for scene in column]) for column in zip(*scenes, strict=True)]
        latents = encode(
            self.pipeline.vae, torch.cat([*references, world.to_tensor([scene.draw() for scene in targets])])
        )
        *references, means = latents.chunk(len(references) + 1)
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        context = KLEIN.text_context(self.pipeline, prompts).with_references(*map(KLEIN.latents, references))
        return Rows(context, means[:, None], torch.randn(means.shape, generator=generator))

    def _edit(self, rng: np.random.Generator) -> tuple[str, tuple[Scene], Scene]:
        edit, source, target = self._edited(self.known_edits, rng)
        if rng.random() < NONSENSE_SHARE:
            is_word = rng.random() < 0.5
            instruction = nonsense_instruction(world.nonsense_word(rng)) if is_word else BLUE.instruction
            return instruction, (source,), source
        return edit.instruction, (source,), target

    def _pair(self, rng: np.random.Generator) -> tuple[str, tuple[Scene, Scene], Scene]:
        edit, source, target = self._edited(self.every_edit, rng)
        is_said = False
        if rng.random() < EDITED_SHARE:
            is_said = rng.random() < SAID_SHARE
        else:
            is_same = rng.random() < SAME_BACKGROUND_SHARE
            background = source.background if is_same else world.random_background(rng)
            target = Scene(self._random_sprite(rng), source.pose, background)
        if rng.random() >= SAME_PLACE_SHARE:
            target = Scene(target.sprite, world.random_pose(rng), target.background)
        if not is_said:
            edit = self.every_edit[rng.integers(len(self.every_edit))]
        instruction = edit.instruction
        if not is_said and rng.random() < 0.5:
            instruction = nonsense_instruction(world.nonsense_word(rng))
        return instruction + PAIR_SUFFIX, (source, target), target

    def _copy(self, rng: np.random.Generator) -> tuple[str, tuple[Scene], Scene]:
        scene = Scene(self._random_sprite(rng), world.random_pose(rng), world.random_background(rng))
        caption = world.caption(world.nonsense_word(rng), world.random_background(rng))
        return caption + COPY_SUFFIX, (scene,), scene

    def _random_sprite(self, rng: np.random.Generator) -> np.ndarray:
        """Half of them with a name."""
        low, high = (0, len(self.appearances)) if rng.random() < 0.5 else (len(self.appearances), len(self.sprites))
        return self.sprites[rng.integers(low, high)]

    def _edited(self, edits: list[Edit], rng: np.random.Generator) -> tuple[Edit, Scene, Scene]:
        """One of the edits, and a random picture before and after it."""
        pose, background = world.random_pose(rng), world.random_background(rng)
        while True:
            if rng.random() < NAMED_SHARE:
                edit = edits[rng.integers(len(edits))]
                before = self.appearances[rng.integers(len(self.appearances))]
                fits = edit.applies_to(before) and not edit.object(before).is_held_out
                source, target = world.sprite(before), world.sprite(edit.object(before))
            else:
                index = rng.integers(len(self.nameless.edits))
                edit = self.nameless.edits[index]
                fits = edit in edits
                source, target = self.nameless.sources[index], self.nameless.targets[index]
            if fits and (edit.kind != BACKGROUND or edit.value != background):
                return edit, Scene(source, pose, background), Scene(target, pose, edit.background(background))


def make_editor_buffers(
    source: EditorRowSource, teacher: PosteriorTeacher, sigmas: torch.Tensor, rows_per_slot: dict[str, int]
) -> list[list[RolloutBuffer]]:
    """`make_buffers` and one buffer per kind of `EDIT_KINDS`, grouped by the number of references."""
    without, one = make_buffers(source, teacher, sigmas, rows_per_slot)
    edit, pair, copy = (RolloutBuffer(kind, rows_per_slot[kind], source, teacher) for kind in EDIT_KINDS)
    return [without, [*one, edit, copy], [pair]]
