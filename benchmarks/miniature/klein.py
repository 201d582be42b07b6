"""The miniature FLUX.2-klein, for the code that makes and measures miniatures."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLFlux2, Flux2KleinPipeline, Flux2Transformer2DModel

from benchmarks.miniature import vae as klein_vae
from benchmarks.miniature import world
from benchmarks.miniature.architecture import Architecture
from benchmarks.miniature.parts import MAX_SEQUENCE_LENGTH, NUM_STEPS, make_transformer
from benchmarks.miniature.tasks import References, reference_columns
from pipelines.flux2_klein import Flux2KleinDOPSDPipeline, KleinContext


class Klein(Architecture):
    title = "FLUX.2-klein"
    stock_pipeline_class, pipeline_options = Flux2KleinPipeline, {"is_distilled": True}
    num_steps = NUM_STEPS
    max_sequence_length = MAX_SEQUENCE_LENGTH
    # The first four slots form a whole trajectory. The others start at the teacher's state after segment 0, which
    # only prepares what the later segments decide.
    slots, entry_slots = (0, 1, 2, 3, 1, 2, 3), (0, 4)
    num_substeps = 6

    def load(self, folder: Path) -> Flux2KleinDOPSDPipeline:
        return Flux2KleinDOPSDPipeline.from_pretrained(folder)

    def make_transformer(self) -> Flux2Transformer2DModel:
        return make_transformer()

    def encode(self, vae: AutoencoderKLFlux2, pictures: torch.Tensor) -> torch.Tensor:
        return klein_vae.encode(vae, pictures)

    def tokens(self, latents: torch.Tensor) -> torch.Tensor:
        return latents.permute(0, 2, 3, 1)

    def latents(self, tokens: torch.Tensor) -> torch.Tensor:
        return tokens.permute(0, 3, 1, 2)

    def picture_context(
        self, pipeline: Flux2KleinDOPSDPipeline, prompts: Sequence[str], pictures: Sequence[np.ndarray]
    ) -> KleinContext:
        references = self.encode(pipeline.vae, world.to_tensor(pictures))
        return self.text_context(pipeline, prompts).with_references(self.latents(references))

    def reference_context(
        self, pipeline: Flux2KleinDOPSDPipeline, prompts: Sequence[str], references: References
    ) -> KleinContext:
        grids = (
            torch.cat([pipeline.encode_reference(image) for image in column])
            for column in reference_columns(references)
        )
        return self.text_context(pipeline, prompts).with_references(*grids)

    def join(self, contexts: Sequence[KleinContext]) -> KleinContext:
        grids = zip(*(context.references for context in contexts), strict=True)
        return KleinContext(
            torch.cat([context.prompt_embeds for context in contexts]), tuple(torch.cat(grid) for grid in grids)
        )

    def select(self, context: KleinContext, indices: torch.Tensor) -> KleinContext:
        return KleinContext(context.prompt_embeds[indices], tuple(grid[indices] for grid in context.references))


KLEIN = Klein()
