"""Training rows for the distillation: captions, references, and the pictures that they allow."""

from dataclasses import dataclass

import numpy as np
import torch
from diffusers import DiffusionPipeline

from benchmarks.miniature import world
from benchmarks.miniature.architecture import Architecture, Context
from benchmarks.miniature.teacher import LatentWorld


# Share of the captions with a reference that ask for the reference by its suffix, unless their words contradict it.
SUFFIX_SHARE = 0.75
# Share of the describing captions that begin with a nonsense word, which is to be ignored.
EXTRA_WORD_SHARE = 0.25
# Without a reference, a nonsense word stands for an object of this texture, in any shape and colour.
UNKNOWN_TEXTURE = "plain"


@dataclass(frozen=True)
class RowKind:
    """How to draw rows of one kind.

    Attributes:
        has_reference: whether rows have a reference picture.
        conflict_share: rows whose words describe another object than the reference shows. The words win.
        named_share: of the other rows, those of objects that words can describe.
        described_share: of these, the ones that words do describe. All other captions have a nonsense word.
    """

    has_reference: bool
    conflict_share: float
    named_share: float
    described_share: float


ROW_KINDS = {
    "text": RowKind(has_reference=False, conflict_share=0, named_share=1, described_share=1),
    "word": RowKind(has_reference=False, conflict_share=0, named_share=1, described_share=0),
    "reference": RowKind(has_reference=True, conflict_share=0.3, named_share=0.15, described_share=0.4),
}


@dataclass
class Rows:
    """B captions and the pictures that they allow.

    Attributes:
        context: the encoded captions and reference pictures.
        means: (B, M, 8, 8, 64), latents of the allowed pictures without grain.
        states: (B, 8, 8, 64), x at the start of each row's segment.
    """

    context: Context
    means: torch.Tensor
    states: torch.Tensor


class RowSource:
    """Draws random rows.

    Args:
        architecture: the pipeline's.
        pipeline: encodes captions and references.
        sprites: (N, 40, 40, 4), first those of `appearances`, then objects without a name.
        latent_world: scenes of these objects.
        appearances: the objects with a name.
    """

    def __init__(
        self,
        architecture: Architecture,
        pipeline: DiffusionPipeline,
        sprites: np.ndarray,
        latent_world: LatentWorld,
        appearances: list[world.Appearance],
    ):
        self.architecture, self.pipeline = architecture, pipeline
        self.sprites, self.latents, self.appearances = sprites, latent_world, appearances
        is_named = latent_world.objects < len(appearances)
        self.named, self.unnamed = is_named.nonzero()[:, 0].numpy(), (~is_named).nonzero()[:, 0].numpy()
        is_unknown = torch.tensor([item.texture == UNKNOWN_TEXTURE for item in appearances])
        unknown = self.named[is_unknown[latent_world.objects[self.named]].numpy()]
        # For each background, the scenes that a nonsense word allows without a reference.
        self.unknown = [unknown[latent_world.backgrounds[unknown] == index] for index in range(len(world.BACKGROUNDS))]

    def draw(self, kind: str, count: int, rng: np.random.Generator) -> Rows:
        """`count` new rows at sigma = 1.

        Args:
            kind: "text": words describe the object. "word": a nonsense word stands for any object of
                `UNKNOWN_TEXTURE`. "reference": a picture shows the object, or another one that the words contradict.
        """
        row_kind = ROW_KINDS[kind]
        is_conflict = rng.random(count) < row_kind.conflict_share
        is_named = is_conflict | (rng.random(count) < row_kind.named_share)
        scenes = np.where(is_named, rng.choice(self.named, count), rng.choice(self.unnamed, count))
        objects = self.latents.objects[scenes].tolist()
        shown = np.where(is_conflict, rng.integers(len(self.sprites), size=count), objects).tolist()
        is_described = is_conflict | (is_named & (rng.random(count) < row_kind.described_share))
        may_have_suffix = ~is_conflict & row_kind.has_reference
        captions = [self._caption(*row, rng) for row in zip(scenes, is_described, may_have_suffix, strict=True)]
        means = self._unknown_means(scenes) if kind == "word" else self.latents.means[scenes]
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        if row_kind.has_reference:
            context = self.architecture.picture_context(self.pipeline, captions, self._pictures(shown, rng))
        else:
            context = self.architecture.text_context(self.pipeline, captions)
        return Rows(context, means.float(), torch.randn(count, *means.shape[2:], generator=generator))

    def _caption(self, scene: int, is_described: bool, may_have_suffix: bool, rng: np.random.Generator) -> str:
        words = world.nonsense_word(rng)
        if is_described:
            extra = f"{words} " if rng.random() < EXTRA_WORD_SHARE else ""
            words = extra + self.appearances[self.latents.objects[scene]].words
        suffix = world.REFERENCE_SUFFIX if may_have_suffix and rng.random() < SUFFIX_SHARE else ""
        return world.caption(words, list(world.BACKGROUNDS)[self.latents.backgrounds[scene]]) + suffix

    def _unknown_means(self, scenes: np.ndarray) -> torch.Tensor:
        """(B, M, 8, 8, 64): all pictures that a nonsense word allows on the scenes' backgrounds."""
        allowed = np.stack([self.unknown[background] for background in self.latents.backgrounds[scenes].tolist()])
        return self.latents.means[allowed].flatten(1, 2)

    def _pictures(self, objects: list[int], rng: np.random.Generator) -> list[np.ndarray]:
        """Of the objects at random poses on random backgrounds, with grain: (64, 64, 3) each."""
        return [
            world.draw(self.sprites[index], world.random_pose(rng), world.random_background(rng), rng)
            for index in objects
        ]
