"""FLUX.2-klein for D-OPSD: contexts of student and teacher, the schedule of the stock pipeline, the velocity."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import PIL.Image
import torch
from diffusers import Flux2KleinPipeline
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu, retrieve_timesteps

from dopsd.rollout import Schedule

from .few_step import FewStepMixin, Images, image_list
from .published import KLEIN_OUT_LAYERS
from .vision_encoder import VisionEncoder


# The stock pipeline shrinks larger reference images to this area, and refuses shorter sides.
MAX_REFERENCE_PIXELS = 1024 * 1024
MIN_REFERENCE_SIDE = 64


@dataclass(frozen=True)
class KleinContext:
    """What the transformer is conditioned on.

    Attributes:
        prompt_embeds: (B, L, D), several text encoder layers concatenated in D, padded to L tokens.
        references: patchified, normalised latents of the reference images, each (B, C, H / 16, W / 16). Those to edit
            come first; the last one of the `edit` teacher is the target image.
    """

    prompt_embeds: torch.Tensor
    references: tuple[torch.Tensor, ...] = ()

    @classmethod
    def stack(cls, samples: list[tuple[torch.Tensor, ...]]) -> "KleinContext":
        """Batches the encodings of single samples: (prompt_embeds, *references), each with batch size 1."""
        prompt_embeds, *references = (torch.cat(parts) for parts in zip(*samples, strict=True))
        return cls(prompt_embeds, tuple(references))

    def to(self, device: torch.device, non_blocking: bool = False) -> "KleinContext":
        return self._each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "KleinContext":
        return self._each(torch.Tensor.pin_memory)

    def _each(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "KleinContext":
        return KleinContext(function(self.prompt_embeds), tuple(map(function, self.references)))

    def with_references(self, *references: torch.Tensor) -> "KleinContext":
        return replace(self, references=references)


class Flux2KleinDOPSDPipeline(FewStepMixin, Flux2KleinPipeline):
    """`Flux2KleinPipeline` with the methods that D-OPSD needs. The transformer's latents are patchified."""

    enable_thinking = False

    @torch.no_grad()
    def encode_student(
        self,
        prompts: list[str],
        *,
        max_sequence_length: int = 512,
        text_encoder_out_layers: tuple[int, ...] = KLEIN_OUT_LAYERS,
    ) -> KleinContext:
        """The student's context c_s = f_text(y), from prompts only.

        Returns:
            prompt_embeds (B, max_sequence_length, number of layers * text width), no references.
        """
        prompt_embeds, _ = self.encode_prompt(
            prompts,
            device=self.text_encoder.device,
            max_sequence_length=max_sequence_length,
            text_encoder_out_layers=text_encoder_out_layers,
        )
        return KleinContext(prompt_embeds)

    def encode_edit_teacher(
        self,
        prompts: list[str],
        images: list[Images],
        *,
        prompt_suffix: str = "",
        max_sequence_length: int = 512,
        text_encoder_out_layers: tuple[int, ...] = KLEIN_OUT_LAYERS,
    ) -> KleinContext:
        """The `edit` teacher's context c_t = f_mm(y, image): prompts with a suffix, and each image as a reference.

        Args:
            images: one per prompt, or a list of them per prompt: those to edit, then the result. All prompts have as
                many, of the same sizes in the same order, because their tokens share positions.

        Returns:
            prompt_embeds as from `encode_student`, and the references.
        """
        context = self.encode_student(
            [prompt + prompt_suffix for prompt in prompts],
            max_sequence_length=max_sequence_length,
            text_encoder_out_layers=text_encoder_out_layers,
        )
        samples = ([*map(self.encode_reference, image_list(image))] for image in images)
        return context.with_references(*map(torch.cat, zip(*samples, strict=True)))

    def encode_vlm_teacher(
        self,
        prompts: list[str],
        images: list[Images],
        *,
        vision_encoder: VisionEncoder,
        max_sequence_length: int = 512,
        text_encoder_out_layers: tuple[int, ...] = KLEIN_OUT_LAYERS,
    ) -> KleinContext:
        """The `vlm` teacher's context c_t = f_mm(y, image): the text encoder sees images before each prompt.

        Args:
            images: one per prompt, or a list of them per prompt, of any size.
            vision_encoder: with this pipeline's text encoder loaded into it.
            max_sequence_length: length to pad to, as in `encode_student`, because the transformer sees the padding.
                Must be at least the length of the text with its image.

        Returns:
            prompt_embeds as from `encode_student`, no references.
        """
        embeds = []
        for prompt, image in zip(prompts, images, strict=True):
            hidden = self.vlm_hidden_states(prompt, image, vision_encoder, pad_to=max_sequence_length)
            embeds.append(torch.cat([hidden[layer] for layer in text_encoder_out_layers], dim=-1))
        return KleinContext(torch.cat(embeds))

    @torch.no_grad()
    def encode_reference(self, image: PIL.Image.Image, resolution: int | None = None) -> torch.Tensor:
        """Encodes a reference image as `Flux2KleinPipeline.__call__(image=...)` does.

        Args:
            resolution: shrinks the image first, see `shrunk_size`.

        Returns:
            (1, C, H / 16, W / 16), patchified and batch-normalised, in the VAE's dtype and on its device.
        """
        self.image_processor.check_image_input(image)
        height, width = shrunk_size(image.height, image.width, resolution)
        if (width, height) != image.size:
            image = image.resize((width, height), PIL.Image.Resampling.LANCZOS)
        side = self.token_pixels
        pixels = self.image_processor.preprocess(
            image, height=height // side * side, width=width // side * side, resize_mode="crop"
        )
        return self._encode_vae_image(pixels.to(self.vae.device, self.vae.dtype), generator=None)

    @property
    def latents_dtype(self) -> torch.dtype:
        """Dtype in which the stock pipeline takes its steps: that of its weights."""
        return self.vae.dtype

    @property
    def latent_pixels(self) -> int:
        """Side, in pixels, of the square behind one element of the transformer's latents: one token."""
        return self.token_pixels

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(C, H / 16, W / 16), the shape of one sample's patchified latents for an image of H x W pixels."""
        channels = self.vae.config.latent_channels * 4
        return channels, height // self.token_pixels, width // self.token_pixels

    def reference_shape(self, height: int, width: int, resolution: int | None = None) -> tuple[int, int, int]:
        """(C, h, w) of `encode_reference`'s result for an image of H x W pixels."""
        return self.latent_shape(*shrunk_size(height, width, resolution))

    def schedule(self, height: int, width: int, num_steps: int, device: torch.device | None = None) -> Schedule:
        """The sigmas and timesteps of `Flux2KleinPipeline.__call__` at this image size.

        References have no influence: the shift depends on the number of noisy tokens only.
        """
        _, token_rows, token_columns = self.latent_shape(height, width)
        sigmas = np.linspace(1.0, 1 / num_steps, num_steps)
        if getattr(self.scheduler.config, "use_flow_sigmas", False):
            sigmas = None
        mu = compute_empirical_mu(image_seq_len=token_rows * token_columns, num_steps=num_steps)
        timesteps, _ = retrieve_timesteps(self.scheduler, num_steps, device, sigmas=sigmas, mu=mu)
        return Schedule(sigmas=self.scheduler.sigmas.clone(), timesteps=timesteps.clone())

    def predict_velocity(self, latents: torch.Tensor, timestep: torch.Tensor, context: KleinContext) -> torch.Tensor:
        """Predicts v = noise - x0 with the arithmetic of the stock pipeline.

        Args:
            latents: (B, C, h, w), patchified.
            timestep: from `Schedule.timesteps`, a scalar or one per sample.
            context: for the same batch. Latents, context and transformer have the same device and dtype.

        Returns:
            (B, C, h, w), in the dtype of the latents.
        """
        batch_size, _, rows, columns = latents.shape
        tokens = self._pack_latents(latents)
        time = timestep.expand(batch_size).to(latents.dtype) / 1000
        if context.references:
            packed = [self._pack_latents(reference) for reference in context.references]
            tokens = torch.cat([tokens, *packed], dim=1)
        sizes = tuple(reference.shape[-2:] for reference in context.references)
        velocity = self.transformer(
            hidden_states=tokens,
            timestep=time,
            guidance=None,
            encoder_hidden_states=context.prompt_embeds,
            txt_ids=_text_ids(context.prompt_embeds.shape[1], latents.device),
            img_ids=_image_ids((rows, columns), sizes, latents.device),
            return_dict=False,
        )[0]
        velocity = velocity[:, : rows * columns]
        return velocity.permute(0, 2, 1).unflatten(2, (rows, columns))

    def image_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """The VAE's latents, (B, C / 4, H / 8, W / 8), from the transformer's, (B, C, H / 16, W / 16)."""
        mean = self.vae.bn.running_mean.view(1, -1, 1, 1).to(latents.device, latents.dtype)
        variance = self.vae.bn.running_var.view(1, -1, 1, 1) + self.vae.config.batch_norm_eps
        return self._unpatchify_latents(latents * torch.sqrt(variance).to(latents.device, latents.dtype) + mean)


def shrunk_size(height: int, width: int, resolution: int | None = None) -> tuple[int, int]:
    """The (height, width), in pixels, that a reference image is resized to before it is cropped to whole tokens.

    The rule is the stock pipeline's: a target area with the image's aspect ratio, both sides rounded down. The stock
    pipeline computes in floating point, which may lose a pixel and with it a row of tokens.

    Args:
        resolution: the target area is its square, but no side becomes shorter than `MIN_REFERENCE_SIDE`, and the image
            is not enlarged. Default: only the stock pipeline's limit counts.
    """
    if resolution is not None:
        short, long = sorted((height, width))
        least = -(-(MIN_REFERENCE_SIDE**2) * long // short)
        area = min(height * width, max(resolution**2, least))
        height, width = math.isqrt(height * area // width), math.isqrt(width * area // height)
    if height * width > MAX_REFERENCE_PIXELS:
        scale = math.sqrt(MAX_REFERENCE_PIXELS / (width * height))
        height, width = int(height * scale), int(width * scale)
    return height, width


# All samples of a batch have the same positions. They are cached because they depend on the sizes only: every bucket
# has two, the student's and the teacher's.
@lru_cache(maxsize=256)
def _text_ids(length: int, device: torch.device) -> torch.Tensor:
    """(L, 4), positions of the text tokens."""
    return Flux2KleinPipeline._prepare_text_ids(torch.empty(1, length, 0))[0].to(device)


@lru_cache(maxsize=256)
def _image_ids(
    size: tuple[int, int], reference_sizes: tuple[tuple[int, int], ...], device: torch.device
) -> torch.Tensor:
    """(S, 4), positions of the noisy tokens (T = 0), then of each reference's tokens (T = 10, 20, ...)."""
    ids = [Flux2KleinPipeline._prepare_latent_ids(torch.empty(1, 0, *size))[0]]
    if reference_sizes:
        references = [torch.empty(1, 0, *reference_size) for reference_size in reference_sizes]
        ids.append(Flux2KleinPipeline._prepare_image_ids(references)[0])
    return torch.cat(ids).to(device)
