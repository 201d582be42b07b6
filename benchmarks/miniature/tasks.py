"""Tasks for a model: prompts, references, and what the pictures should show."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from PIL import Image

from benchmarks.miniature import world


References = Sequence[Image.Image] | Sequence[tuple[Image.Image, ...]]  # of several prompts


@dataclass(frozen=True)
class Task:
    """N prompts and the pictures that would fulfil them.

    Attributes:
        prompts: with the reference suffix if there are references.
        references: one picture per prompt, or equally many for each in a tuple, or none at all.
        wanted: the objects to be drawn.
        backgrounds: names of the backgrounds to be drawn.
        real: (N, 3, 64, 64), pictures drawn by the world.
        first_seed: of the noise of the first picture; the next one has the next seed.
    """

    prompts: list[str]
    references: References
    wanted: list[world.Appearance]
    backgrounds: list[str]
    real: torch.Tensor
    first_seed: int = field(default=0, kw_only=True)

    @property
    def seeds(self) -> list[int]:
        """Of the pictures' noise."""
        return list(range(self.first_seed, self.first_seed + len(self.prompts)))

    def select(self, indices: Sequence[int], *, first_seed: int) -> "Task":
        """The prompts with these indices, of a task without references."""
        assert not self.references
        return replace(
            self,
            prompts=[self.prompts[index] for index in indices],
            wanted=[self.wanted[index] for index in indices],
            backgrounds=[self.backgrounds[index] for index in indices],
            real=self.real[list(indices)],
            first_seed=first_seed,
        )


def reference_columns(references: References) -> list[tuple[Image.Image, ...]]:
    """All prompts' first pictures, then their second ones; empty without references."""
    rows = (item if isinstance(item, tuple) else (item,) for item in references)
    return [*zip(*rows, strict=True)]


def make_task(appearances: Sequence[world.Appearance], count: int, *, with_reference: bool, seed: int) -> Task:
    """Random objects on random backgrounds, given by their words, or by a nonsense word and a reference.

    With the same seed, a larger task begins with the prompts of a smaller one.
    """
    rng = np.random.default_rng(seed)
    wanted, backgrounds, prompts, references, real = [], [], [], [], []
    for _ in range(count):
        appearance = appearances[rng.integers(len(appearances))]
        background = world.random_background(rng)
        wanted.append(appearance)
        backgrounds.append(background)
        real.append(random_picture(appearance, background, rng))
        if with_reference:
            other = rng.choice([name for name in world.BACKGROUNDS if name != background])
            references.append(world.to_image(random_picture(appearance, other, rng)))
            prompts.append(world.caption(world.nonsense_word(rng), background) + world.REFERENCE_SUFFIX)
        else:
            prompts.append(world.caption(appearance.words, background))
    return Task(prompts, references, wanted, backgrounds, world.to_tensor(real))


def random_picture(
    appearance: world.Appearance, background: str, rng: np.random.Generator, style: world.Style = world.ORDINARY
) -> np.ndarray:
    """(64, 64, 3): the object at a random pose, with grain."""
    return world.draw(world.sprite(appearance, style), world.random_pose(rng), background, rng)


def standard_tasks(count: int) -> dict[str, Task]:
    """`count` prompts by text and as many by reference, each for objects seen in training and for others."""
    known, held_out = world.known_appearances(), world.held_out_appearances()
    known_words = [
        appearance
        for appearance in held_out
        if appearance.shape != world.HELD_OUT_SHAPE and appearance.texture != world.HELD_OUT_TEXTURE
    ]
    return {
        "text_seen": make_task(known, count, with_reference=False, seed=1),
        "text_unseen": make_task(known_words, count, with_reference=False, seed=2),
        "reference_seen": make_task(known, count, with_reference=True, seed=3),
        "reference_unseen": make_task(held_out, count, with_reference=True, seed=4),
    }
