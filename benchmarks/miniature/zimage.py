"""The miniature Z-Image-Turbo, for the code that makes and measures miniatures."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, ZImagePipeline, ZImageTransformer2DModel
from PIL import Image

from benchmarks.miniature import world
from benchmarks.miniature.architecture import Architecture, PassCosts
from benchmarks.miniature.files import REPOSITORY, ZIMAGE_MODEL
from benchmarks.miniature.tasks import References
from benchmarks.miniature.zimage_parts import NUM_STEPS, make_transformer
from pipelines.published import Z_IMAGE_LORA_LAYERS
from pipelines.vision_encoder import VisionEncoder
from pipelines.z_image import ZImageContext, ZImageDOPSDPipeline


VLM_FOLDER = "vlm"  # in the pipeline's folder
VLM_PIXELS = world.SIDE**2  # at least and at most


class ZImage(Architecture):
    name, title = "zimage", "Z-Image-Turbo"
    folder, script = ZIMAGE_MODEL, REPOSITORY / "train_dopsd_zimage.py"
    lora_layers = Z_IMAGE_LORA_LAYERS
    costs = PassCosts(forward_and_backward=2.12, teacher=1.67, base=0.84, base_teacher=1.39)
    stock_pipeline_class, pipeline_options = ZImagePipeline, {}
    num_steps, guidance_scale = NUM_STEPS, 0.0
    max_sequence_length = 64
    slots, entry_slots = tuple(range(NUM_STEPS)), (0,)
    num_substeps = 3

    def load(self, folder: Path, *, vlm_rope: str = "vlm") -> ZImageDOPSDPipeline:
        pipeline = ZImageDOPSDPipeline.from_pretrained(folder)
        self.load_vlm(pipeline, folder / VLM_FOLDER, rope=vlm_rope)
        return pipeline

    def script_flags(self, folder: Path) -> dict[str, object]:
        return {
            "max_sequence_length": self.max_sequence_length,
            "teacher_context": "vlm",
            "vlm_model_name_or_path": folder / VLM_FOLDER,
            "vlm_min_pixels": VLM_PIXELS,
            "vlm_max_pixels": VLM_PIXELS,
        }

    def picture_latents(self, pipeline: ZImageDOPSDPipeline, pictures: Sequence[Image.Image]) -> torch.Tensor:
        pixels = torch.cat([pipeline.image_processor.preprocess(picture) for picture in pictures])
        return self.latents(self.encode(pipeline.vae, pixels))

    def load_vlm(self, pipeline: ZImageDOPSDPipeline, folder: Path, *, rope: str = "vlm") -> None:
        """Makes the pipeline's teacher use this Qwen3-VL.

        Args:
            rope: see `VisionEncoder`.
        """
        pipeline.vision_encoder = VisionEncoder(
            str(folder),
            pipeline.tokenizer,
            pipeline.text_encoder.config,
            min_pixels=VLM_PIXELS,
            max_pixels=VLM_PIXELS,
            rope=rope,
        )
        pipeline.vision_encoder.load(pipeline.text_encoder)

    def make_transformer(self) -> ZImageTransformer2DModel:
        return make_transformer()

    @torch.no_grad()
    def encode(self, vae: AutoencoderKL, pictures: torch.Tensor) -> torch.Tensor:
        latents = torch.cat([vae.encode(batch).latent_dist.mode() for batch in pictures.split(32)])
        return self.tokens((latents - vae.config.shift_factor) * vae.config.scaling_factor)

    def tokens(self, latents: torch.Tensor) -> torch.Tensor:
        """In the transformer's order of channels: row in the token, column in the token, channel of the latents."""
        return latents.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).permute(0, 2, 4, 3, 5, 1).flatten(3)

    def latents(self, tokens: torch.Tensor) -> torch.Tensor:
        parts = tokens.unflatten(3, (2, 2, -1)).permute(0, 5, 1, 3, 2, 4)
        return parts.flatten(4, 5).flatten(2, 3)

    def picture_context(
        self, pipeline: ZImageDOPSDPipeline, prompts: Sequence[str], pictures: Sequence[np.ndarray]
    ) -> ZImageContext:
        return self.reference_context(pipeline, prompts, [world.to_image(picture) for picture in pictures])

    def reference_context(
        self, pipeline: ZImageDOPSDPipeline, prompts: Sequence[str], references: References
    ) -> ZImageContext:
        return pipeline.encode_vlm_teacher(list(prompts), list(references), vision_encoder=pipeline.vision_encoder)

    def join(self, contexts: Sequence[ZImageContext]) -> ZImageContext:
        return ZImageContext(tuple(embeds for context in contexts for embeds in context.prompt_embeds))

    def select(self, context: ZImageContext, indices: torch.Tensor) -> ZImageContext:
        return ZImageContext(tuple(context.prompt_embeds[index] for index in indices.tolist()))


ZIMAGE = ZImage()
