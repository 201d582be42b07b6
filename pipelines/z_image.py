"""Z-Image-Turbo for D-OPSD: contexts of student and teacher, the schedule of the stock pipeline, the velocity."""

from dataclasses import dataclass

import torch
from diffusers import ZImagePipeline
from diffusers.pipelines.z_image.pipeline_z_image import (
    calculate_shift,
    get_default_z_image_sigmas,
    retrieve_timesteps,
)

from dopsd.rollout import Schedule

from .few_step import FewStepMixin, Images
from .vision_encoder import VisionEncoder


# Of the scheduler that Z-Image-Turbo is published with. The undistilled Z-Image has another one.
TURBO_SHIFT = 3.0


@dataclass(frozen=True)
class ZImageContext:
    """What the transformer is conditioned on.

    Attributes:
        prompt_embeds: (L, D) for each sample, the second to last layer of the text encoder, without padding.
    """

    prompt_embeds: tuple[torch.Tensor, ...]

    @classmethod
    def stack(cls, samples: list[tuple[torch.Tensor]]) -> "ZImageContext":
        """Batches the encodings of single samples: (prompt_embeds,), each (L, D)."""
        return cls(tuple(prompt_embeds for (prompt_embeds,) in samples))

    def to(self, device: torch.device, non_blocking: bool = False) -> "ZImageContext":
        return ZImageContext(tuple(embeds.to(device, non_blocking=non_blocking) for embeds in self.prompt_embeds))

    def pin_memory(self) -> "ZImageContext":
        return ZImageContext(tuple(embeds.pin_memory() for embeds in self.prompt_embeds))


class ZImageDOPSDPipeline(FewStepMixin, ZImagePipeline):
    """`ZImagePipeline` with the methods that D-OPSD needs."""

    enable_thinking = True

    @torch.no_grad()
    def encode_student(self, prompts: list[str], *, max_sequence_length: int = 512) -> ZImageContext:
        """The student's context c_s = f_text(y), from prompts only.

        Returns:
            prompt_embeds (L, D) for each prompt, with L at most `max_sequence_length`. Longer texts are truncated.
        """
        # A copy, because the stock method writes the chat texts into the list.
        prompt_embeds, _ = self.encode_prompt(
            list(prompts),
            device=self.text_encoder.device,
            do_classifier_free_guidance=False,
            max_sequence_length=max_sequence_length,
        )
        return ZImageContext(tuple(prompt_embeds))

    def encode_vlm_teacher(
        self, prompts: list[str], images: list[Images], *, vision_encoder: VisionEncoder
    ) -> ZImageContext:
        """The `vlm` teacher's context c_t = f_mm(y, image): the text encoder sees images before each prompt.

        Args:
            images: one per prompt, or a list of them per prompt, of any size.
            vision_encoder: with this pipeline's text encoder loaded into it.

        Returns:
            prompt_embeds (L, D) for each prompt, with the tokens of chat template, image and prompt. Nothing is
            truncated.
        """
        embeds = []
        for prompt, image in zip(prompts, images, strict=True):
            embeds.append(self.vlm_hidden_states(prompt, image, vision_encoder)[-2][0])
        return ZImageContext(tuple(embeds))

    @property
    def latents_dtype(self) -> torch.dtype:
        """Dtype in which the stock pipeline takes its steps, whatever the dtype of its weights."""
        return torch.float32

    @property
    def latent_pixels(self) -> int:
        """Side, in pixels, of the square behind one element of the latents: half a token."""
        return self.vae_scale_factor

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(C, H / 8, W / 8), the shape of one sample's latents for an image of H x W pixels."""
        return (
            self.vae.config.latent_channels,
            2 * (height // self.token_pixels),
            2 * (width // self.token_pixels),
        )

    def schedule(self, height: int, width: int, num_steps: int, device: torch.device | None = None) -> Schedule:
        """The sigmas and timesteps of `ZImagePipeline.__call__` at this image size.

        The published scheduler has the same shift of 3 at every size. With dynamic shifting, it depends on the size.
        """
        config = self.scheduler.config
        _, rows, columns = self.latent_shape(height, width)
        mu = calculate_shift(
            (rows // 2) * (columns // 2),
            config.get("base_image_seq_len", 256),
            config.get("max_image_seq_len", 4096),
            config.get("base_shift", 0.5),
            config.get("max_shift", 1.15),
        )
        timesteps, _ = retrieve_timesteps(
            self.scheduler, num_steps, device, sigmas=get_default_z_image_sigmas(num_steps), mu=mu
        )
        return Schedule(sigmas=self.scheduler.sigmas.clone(), timesteps=timesteps.clone())

    def predict_velocity(self, latents: torch.Tensor, timestep: torch.Tensor, context: ZImageContext) -> torch.Tensor:
        """Predicts v = noise - x0, the negative of the transformer's output, with the stock pipeline's arithmetic.

        Args:
            latents: (B, C, h, w), float32.
            timestep: from `Schedule.timesteps`, a scalar or one per sample.
            context: for the same batch, on the same device, in the transformer's dtype.

        Returns:
            (B, C, h, w), float32.
        """
        time = (1000 - timestep.expand(latents.shape[0])) / 1000
        # The transformer takes a list of (C, 1, h, w). It would look for its dtype in all of its modules at each call.
        inputs = list(latents.to(context.prompt_embeds[0].dtype).unsqueeze(2).unbind(dim=0))
        outputs = self.transformer(inputs, time, list(context.prompt_embeds), return_dict=False)[0]
        return -torch.stack([output.float() for output in outputs]).squeeze(2)

    def vae_latents(self, image_latents: torch.Tensor) -> torch.Tensor:
        """The latents that the VAE decodes: rescaled and shifted, (B, C, H / 8, W / 8)."""
        return image_latents / self.vae.config.scaling_factor + self.vae.config.shift_factor


def is_turbo(scheduler_config: dict) -> bool:
    """Whether this is the scheduler of Z-Image-Turbo. Nothing else in a checkpoint tells it from Z-Image."""
    return scheduler_config.get("shift") == TURBO_SHIFT and not scheduler_config.get("use_dynamic_shifting")
