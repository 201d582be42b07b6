"""What the D-OPSD pipelines have in common: chat texts, sampling from an encoded context, decoding."""

from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

import PIL.Image
import torch

from dopsd.rollout import few_step_sample

from .chat_template import apply_chat_template
from .vision_encoder import VisionEncoder


Images = PIL.Image.Image | Sequence[PIL.Image.Image]  # of one prompt


def image_list(images: Images) -> Sequence[PIL.Image.Image]:
    """One prompt's images as a list."""
    return [images] if isinstance(images, PIL.Image.Image) else images


class FewStepMixin:
    """Mixin for a stock few-step pipeline with a Qwen3 text encoder.

    The pipeline class adds what depends on the model: `schedule`, `predict_velocity`, `latent_shape`, `latent_pixels`,
    and `image_latents` and `vae_latents` where its latents differ from the ones that are returned and decoded.

    Attributes:
        enable_thinking: the argument that the stock pipeline passes to the chat template.
    """

    enable_thinking: ClassVar[bool]

    def chat_text(self, content: str) -> str:
        """The user's message in the chat template, as the text encoder reads it."""
        return apply_chat_template(self.tokenizer, content, enable_thinking=self.enable_thinking)

    def chat_token_count(self, content: str) -> int:
        """Number of tokens of `chat_text`, before padding. The stock pipeline truncates a longer text."""
        return len(self.tokenizer(self.chat_text(content)).input_ids)

    def vlm_hidden_states(
        self, prompt: str, images: Images, vision_encoder: VisionEncoder, *, pad_to: int | None = None
    ) -> tuple[torch.Tensor, ...]:
        """Hidden states of the text encoder for a chat text with one or several images before the prompt.

        Args:
            vision_encoder: with this pipeline's text encoder loaded into it.
            pad_to: see `VisionEncoder.hidden_states`.

        Returns:
            (1, L, D) for the embeddings and each layer.
        """
        images = image_list(images)
        counts = (vision_encoder.num_image_tokens(image.height, image.width) for image in images)
        content = vision_encoder.content(prompt, *counts)
        return vision_encoder.hidden_states(self.chat_text(content), *images, pad_to=pad_to)

    @property
    def token_pixels(self) -> int:
        """Side, in pixels, of the square behind one image token of the transformer."""
        return self.vae_scale_factor * 2

    @torch.no_grad()
    def sample(self, context: Any, noise: torch.Tensor, num_steps: int) -> torch.Tensor:
        """Samples from an encoded context. Needs no text encoder.

        Args:
            context: for the same batch size as the noise, and on its device.
            noise: (B, C, h, w), the transformer's own latents, in `latents_dtype`.

        Returns:
            What the stock pipeline returns for `latents=noise, output_type="latent"` at its few-step guidance scale.
        """
        height, width = (side * self.latent_pixels for side in noise.shape[-2:])
        schedule = self.schedule(height, width, num_steps, noise.device)
        latents = few_step_sample(partial(self.predict_velocity, context=context), noise, schedule)
        return self.image_latents(latents)

    def image_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """The latents that the stock pipeline returns, from the transformer's own."""
        return latents

    def vae_latents(self, image_latents: torch.Tensor) -> torch.Tensor:
        """The latents that the VAE decodes, from those of `image_latents`."""
        return image_latents

    @torch.no_grad()
    def picture_latents(self, picture: PIL.Image.Image) -> torch.Tensor:
        """(C, H / 8, W / 8), the VAE's own latents of a picture, encoded on the VAE's device.

        The sides are multiples of `token_pixels`.
        """
        pixels = self.image_processor.preprocess(picture).to(self.vae.device, self.vae.dtype)
        return self.vae.encode(pixels).latent_dist.mode()[0]

    @torch.no_grad()
    def decode(self, image_latents: torch.Tensor) -> list[PIL.Image.Image]:
        """Decodes the result of `sample` or `image_latents`, one image at a time, on the VAE's device."""
        images = []
        for latents in image_latents.split(1):
            latents = self.vae_latents(latents.to(self.vae.device, self.vae.dtype))
            pixels = self.vae.decode(latents, return_dict=False)[0]
            images += self.image_processor.postprocess(pixels, output_type="pil")
        return images
