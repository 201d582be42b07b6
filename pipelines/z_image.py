"""Z-Image-Turbo's side of D-OPSD: contexts for student and teacher, the deployed schedule, the velocity."""

from dataclasses import dataclass
from functools import partial

import PIL.Image
import torch
from diffusers import ZImagePipeline, ZImageTransformer2DModel
from diffusers.pipelines.z_image.pipeline_z_image import (
    calculate_shift,
    get_default_z_image_sigmas,
    retrieve_timesteps,
)

from dopsd.rollout import Schedule, few_step_sample

from .vision_encoder import VisionEncoder


# Attention and feed-forward of all blocks: the main ones, and the refiners of noise and of text.
DEFAULT_LORA_LAYERS = (
    r"(layers|noise_refiner|context_refiner)\.\d+\.(attention\.(to_[qkv]|to_out\.0)|feed_forward\.w[123])"
)

# Of the scheduler that Z-Image-Turbo is published with; the undistilled Z-Image has another.
TURBO_SHIFT = 3.0


@dataclass(frozen=True)
class ZImageContext:
    """What the transformer is conditioned on.

    Attributes:
        prompt_embeds: for each sample (L, D), the text encoder's last but one layer, without padding.
    """

    prompt_embeds: tuple[torch.Tensor, ...]

    @classmethod
    def stack(cls, samples: list[tuple[torch.Tensor]]) -> "ZImageContext":
        """A batch of samples' encodings: (prompt_embeds (L, D),) of each."""
        return cls(tuple(prompt_embeds for (prompt_embeds,) in samples))

    def to(self, device: torch.device) -> "ZImageContext":
        return ZImageContext(tuple(embeds.to(device) for embeds in self.prompt_embeds))


class ZImageDOPSDPipeline(ZImagePipeline):
    """`ZImagePipeline` with what D-OPSD needs; loading, sampling, decoding and LoRA files are inherited."""

    def chat_text(self, content: str) -> str:
        """The user's content as the text encoder reads it."""
        return self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True, enable_thinking=True
        )

    def chat_token_count(self, content: str) -> int:
        """Tokens of the content in its chat text: what exceeds the text encoder's length is cut."""
        return len(self.tokenizer(self.chat_text(content)).input_ids)

    @torch.no_grad()
    def encode_student(self, prompts: list[str], *, max_sequence_length: int = 512) -> ZImageContext:
        """c_s = f_text(y): the prompts alone, each (L, D) with L up to `max_sequence_length`."""
        # A copy: the stock encoder writes the chat text into the list that it is given.
        prompt_embeds, _ = self.encode_prompt(
            list(prompts),
            device=self.text_encoder.device,
            do_classifier_free_guidance=False,
            max_sequence_length=max_sequence_length,
        )
        return ZImageContext(tuple(prompt_embeds))

    def encode_teacher(
        self, prompts: list[str], images: list[PIL.Image.Image], *, vision_encoder: VisionEncoder
    ) -> ZImageContext:
        """c_t = f_mm(y, image): each prompt after its image, read by the text encoder with Qwen3-VL's vision tower.

        Args:
            vision_encoder: with this pipeline's text encoder loaded into it.

        Returns:
            Each (L, D) with all its tokens: text, image and prompt, nothing cut.
        """
        embeds = []
        for prompt, image in zip(prompts, images, strict=True):
            content = vision_encoder.content(prompt, vision_encoder.num_image_tokens(image.height, image.width))
            embeds.append(vision_encoder.hidden_states(self.chat_text(content), image)[-2][0])
        return ZImageContext(tuple(embeds))

    @property
    def token_pixels(self) -> int:
        """Side of the square of pixels that one latent token stands for."""
        return self.vae_scale_factor * 2

    @property
    def latents_dtype(self) -> torch.dtype:
        """In which the stock pipeline steps, whatever the transformer's precision."""
        return torch.float32

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(C, H / 8, W / 8): one sample's latents for an image of that many pixels."""
        return (
            self.vae.config.latent_channels,
            2 * (height // self.token_pixels),
            2 * (width // self.token_pixels),
        )

    def schedule(self, height: int, width: int, num_steps: int, device: torch.device | None = None) -> Schedule:
        """The sigmas and timesteps at which `ZImagePipeline.__call__` samples that image size.

        The published scheduler shifts by 3 at every size; one with dynamic shifting follows the size.
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
        """v = noise - x0, the negative of what the transformer gives, with the pipeline's own arithmetic.

        Args:
            latents: (B, C, h, w), float32.
            timestep: scalar, from `Schedule.timesteps`.
            context: of the same batch and device.

        Returns:
            (B, C, h, w), float32.
        """
        time = (1000 - timestep.expand(latents.shape[0])) / 1000
        # The transformer wants a list of (C, 1, h, w).
        inputs = list(latents.to(self.transformer.dtype).unsqueeze(2).unbind(dim=0))
        outputs = self.transformer(inputs, time, list(context.prompt_embeds), return_dict=False)[0]
        return -torch.stack([output.float() for output in outputs]).squeeze(2)

    def image_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """The latents as `decode` takes them: these here are."""
        return latents

    @torch.no_grad()
    def sample(self, context: ZImageContext, noise: torch.Tensor, num_steps: int) -> torch.Tensor:
        """What `ZImagePipeline.__call__(..., latents=noise, guidance_scale=0, output_type="latent")` returns.

        Args:
            context: of the noise's batch and device.
            noise: (B, C, H / 8, W / 8), float32.

        Returns:
            (B, C, H / 8, W / 8), for `decode`.
        """
        height, width = (side * self.vae_scale_factor for side in noise.shape[-2:])
        schedule = self.schedule(height, width, num_steps, noise.device)
        return few_step_sample(partial(self.predict_velocity, context=context), noise, schedule)

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> list[PIL.Image.Image]:
        """Pictures of (B, C, H / 8, W / 8) latents, decoded one at a time on the VAE's device."""
        images = []
        for one in latents.split(1):
            one = one.to(self.vae.device, self.vae.dtype) / self.vae.config.scaling_factor
            pixels = self.vae.decode(one + self.vae.config.shift_factor, return_dict=False)[0]
            images += self.image_processor.postprocess(pixels, output_type="pil")
        return images


def is_turbo(scheduler_config: dict) -> bool:
    """Whether the scheduler is the one that Z-Image-Turbo is published with: the checkpoint says it nowhere else."""
    return scheduler_config.get("shift") == TURBO_SHIFT and not scheduler_config.get("use_dynamic_shifting")


def transformer_skeleton(name_or_path: str, **kwargs) -> ZImageTransformer2DModel:
    """The transformer on the meta device: its module names, without reading a weight."""
    config = ZImageTransformer2DModel.load_config(name_or_path, subfolder="transformer", **kwargs)
    with torch.device("meta"):
        return ZImageTransformer2DModel.from_config(config)
