"""The miniature FLUX.2-klein, for the code that makes and measures miniatures."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLFlux2, Flux2KleinPipeline, Flux2Transformer2DModel
from PIL import Image

from benchmarks.miniature import vae as klein_vae
from benchmarks.miniature import world
from benchmarks.miniature.architecture import Architecture, PassCosts
from benchmarks.miniature.files import MODEL, REPOSITORY
from benchmarks.miniature.parts import MAX_SEQUENCE_LENGTH, NUM_STEPS, make_transformer
from benchmarks.miniature.tasks import References, reference_columns
from pipelines.flux2_klein import Flux2KleinDOPSDPipeline, KleinContext
from pipelines.published import KLEIN_LORA_LAYERS


class Klein(Architecture):
    name, title = "klein", "FLUX.2-klein"
    folder, script = MODEL, REPOSITORY / "train_dopsd_flux2.py"
    lora_layers = KLEIN_LORA_LAYERS
    costs = PassCosts(forward_and_backward=2.09, teacher=1.71, base=0.87, base_teacher=1.48)
    stock_pipeline_class, pipeline_options = Flux2KleinPipeline, {"is_distilled": True}
    num_steps, guidance_scale = NUM_STEPS, 1.0
    max_sequence_length = MAX_SEQUENCE_LENGTH
    # The first four slots form a whole trajectory. The others start at the teacher's state after segment 0, which
    # only prepares what the later segments decide.
    slots, entry_slots = (0, 1, 2, 3, 1, 2, 3), (0, 4)
    num_substeps = 6

    def load(self, folder: Path) -> Flux2KleinDOPSDPipeline:
        return Flux2KleinDOPSDPipeline.from_pretrained(folder)

    def script_flags(self, folder: Path) -> dict[str, object]:
        return {"max_sequence_length": self.max_sequence_length}

    def picture_latents(self, pipeline: Flux2KleinDOPSDPipeline, pictures: Sequence[Image.Image]) -> torch.Tensor:
        return torch.cat([pipeline.encode_reference(picture) for picture in pictures])

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
        grids = (self.picture_latents(pipeline, column) for column in reference_columns(references))
        return self.text_context(pipeline, prompts).with_references(*grids)

    def join(self, contexts: Sequence[KleinContext]) -> KleinContext:
        grids = zip(*(context.references for context in contexts), strict=True)
        return KleinContext(
            torch.cat([context.prompt_embeds for context in contexts]), tuple(torch.cat(grid) for grid in grids)
        )

    def select(self, context: KleinContext, indices: torch.Tensor) -> KleinContext:
        return KleinContext(context.prompt_embeds[indices], tuple(grid[indices] for grid in context.references))


KLEIN = Klein()
