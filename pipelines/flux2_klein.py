"""FLUX.2-klein's side of D-OPSD: contexts for student and teacher, the deployed schedule, the velocity."""

from dataclasses import dataclass, replace
from functools import lru_cache, partial

import numpy as np
import PIL.Image
import torch
from diffusers import Flux2KleinPipeline, Flux2Transformer2DModel
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu, retrieve_timesteps

from dopsd.rollout import Schedule, few_step_sample

from .vision_encoder import VisionEncoder


TEXT_ENCODER_OUT_LAYERS = (9, 18, 27)

# The pipeline shrinks a larger reference to this area.
MAX_REFERENCE_PIXELS = 1024 * 1024

# Attention and feed-forward of the double-stream blocks, and the fused projections of the single-stream blocks.
DEFAULT_LORA_LAYERS = (
    r"transformer_blocks\.\d+\.(attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)|(ff|ff_context)\.linear_(in|out))"
    r"|single_transformer_blocks\.\d+\.attn\.(to_qkv_mlp_proj|to_out)"
)


@dataclass(frozen=True)
class KleinContext:
    """What the transformer is conditioned on.

    Attributes:
        prompt_embeds: (B, L, D), three text layers side by side, padded to L.
        references: normalised, patchified latents of reference images, each (B, C, H / 16, W / 16). Empty for the
            student; the `edit` teacher's hold the target image.
    """

    prompt_embeds: torch.Tensor
    references: tuple[torch.Tensor, ...] = ()

    @classmethod
    def stack(cls, samples: list[tuple[torch.Tensor, ...]]) -> "KleinContext":
        """A batch of samples' encodings: (prompt_embeds, *references) of each, all with a batch of 1."""
        prompt_embeds, *references = (torch.cat(parts) for parts in zip(*samples, strict=True))
        return cls(prompt_embeds, tuple(references))

    def to(self, device: torch.device) -> "KleinContext":
        return KleinContext(self.prompt_embeds.to(device), tuple(latents.to(device) for latents in self.references))

    def with_references(self, *references: torch.Tensor) -> "KleinContext":
        return replace(self, references=references)


class Flux2KleinDOPSDPipeline(Flux2KleinPipeline):
    """`Flux2KleinPipeline` with what D-OPSD needs; loading, sampling, decoding and LoRA files are inherited."""

    def chat_text(self, content: str) -> str:
        """The user's content as the text encoder reads it."""
        return self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True, enable_thinking=False
        )

    def chat_token_count(self, content: str) -> int:
        """Tokens of the content in its chat text, before padding: what exceeds the text encoder's length is cut."""
        return len(self.tokenizer(self.chat_text(content)).input_ids)

    @torch.no_grad()
    def encode_student(
        self,
        prompts: list[str],
        *,
        max_sequence_length: int = 512,
        text_encoder_out_layers: tuple[int, ...] = TEXT_ENCODER_OUT_LAYERS,
    ) -> KleinContext:
        """c_s = f_text(y): the prompts alone, (B, max_sequence_length, 3 * text width)."""
        prompt_embeds, _ = self.encode_prompt(
            prompts,
            device=self.text_encoder.device,
            max_sequence_length=max_sequence_length,
            text_encoder_out_layers=text_encoder_out_layers,
        )
        return KleinContext(prompt_embeds)

    def encode_teacher(
        self,
        prompts: list[str],
        images: list[PIL.Image.Image],
        *,
        prompt_suffix: str = "",
        max_sequence_length: int = 512,
        text_encoder_out_layers: tuple[int, ...] = TEXT_ENCODER_OUT_LAYERS,
    ) -> KleinContext:
        """c_t = f_mm(y, image): the prompts with a suffix, and each one's image as its reference tokens.

        The images of one batch have one size, since their tokens share positions.
        """
        context = self.encode_student(
            [prompt + prompt_suffix for prompt in prompts],
            max_sequence_length=max_sequence_length,
            text_encoder_out_layers=text_encoder_out_layers,
        )
        return context.with_references(torch.cat([self.encode_reference(image) for image in images]))

    def encode_teacher_vlm(
        self,
        prompts: list[str],
        images: list[PIL.Image.Image],
        *,
        vision_encoder: VisionEncoder,
        max_sequence_length: int = 512,
        text_encoder_out_layers: tuple[int, ...] = TEXT_ENCODER_OUT_LAYERS,
    ) -> KleinContext:
        """c_t = f_mm(y, image): each prompt after its image, read by the text encoder with Qwen3-VL's vision tower.

        Args:
            vision_encoder: with this pipeline's text encoder loaded into it.
            max_sequence_length: what is padded to, as in `encode_student`: the transformer sees the padding.

        Returns:
            prompt_embeds (B, max_sequence_length, 3 * text width), no references.
        """
        embeds = []
        for prompt, image in zip(prompts, images, strict=True):
            content = vision_encoder.content(prompt, vision_encoder.num_image_tokens(image.height, image.width))
            hidden = vision_encoder.hidden_states(self.chat_text(content), image, pad_to=max_sequence_length)
            embeds.append(torch.cat([hidden[layer] for layer in text_encoder_out_layers], dim=-1))
        return KleinContext(torch.cat(embeds))

    @torch.no_grad()
    def encode_reference(self, image: PIL.Image.Image) -> torch.Tensor:
        """Latents of one reference image as `Flux2KleinPipeline.__call__(image=...)` makes them.

        Returns:
            (1, C, H / 16, W / 16), patchified and batch-normalised, in the VAE's dtype and on its device.
        """
        self.image_processor.check_image_input(image)
        width, height = image.size
        if width * height > MAX_REFERENCE_PIXELS:
            image = self.image_processor._resize_to_target_area(image, MAX_REFERENCE_PIXELS)
            width, height = image.size
        side = self.token_pixels
        pixels = self.image_processor.preprocess(
            image, height=height // side * side, width=width // side * side, resize_mode="crop"
        )
        return self._encode_vae_image(pixels.to(self.vae.device, self.vae.dtype), generator=None)

    @property
    def token_pixels(self) -> int:
        """Side of the square of pixels that one latent token stands for."""
        return self.vae_scale_factor * 2

    @property
    def latents_dtype(self) -> torch.dtype:
        """In which the stock pipeline steps: its own precision."""
        return self.vae.dtype

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(C, H / 16, W / 16): one sample's patchified latents for an image of that many pixels."""
        channels = self.vae.config.latent_channels * 4
        return channels, height // self.token_pixels, width // self.token_pixels

    def schedule(self, height: int, width: int, num_steps: int, device: torch.device | None = None) -> Schedule:
        """The sigmas and timesteps at which `Flux2KleinPipeline.__call__` samples that image size.

        References do not count: the schedule depends on the target's tokens alone.
        """
        _, token_rows, token_columns = self.latent_shape(height, width)
        sigmas = np.linspace(1.0, 1 / num_steps, num_steps)
        if getattr(self.scheduler.config, "use_flow_sigmas", False):
            sigmas = None
        mu = compute_empirical_mu(image_seq_len=token_rows * token_columns, num_steps=num_steps)
        timesteps, _ = retrieve_timesteps(self.scheduler, num_steps, device, sigmas=sigmas, mu=mu)
        return Schedule(sigmas=self.scheduler.sigmas.clone(), timesteps=timesteps.clone())

    def predict_velocity(self, latents: torch.Tensor, timestep: torch.Tensor, context: KleinContext) -> torch.Tensor:
        """v = noise - x0 as the transformer predicts it, with the pipeline's own arithmetic.

        Args:
            latents: (B, C, h, w), patchified.
            timestep: scalar, from `Schedule.timesteps`.
            context: of the same batch, device and dtype as the latents, which is the transformer's.

        Returns:
            (B, C, h, w), in the latents' dtype.
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
        """The VAE's latents, (B, C / 4, H / 8, W / 8), from the transformer's (B, C, H / 16, W / 16)."""
        mean = self.vae.bn.running_mean.view(1, -1, 1, 1).to(latents.device, latents.dtype)
        variance = self.vae.bn.running_var.view(1, -1, 1, 1) + self.vae.config.batch_norm_eps
        return self._unpatchify_latents(latents * torch.sqrt(variance).to(latents.device, latents.dtype) + mean)

    @torch.no_grad()
    def sample(self, context: KleinContext, noise: torch.Tensor, num_steps: int) -> torch.Tensor:
        """What `Flux2KleinPipeline.__call__(..., latents=noise, output_type="latent")` returns, from a context.

        The stock call takes no encoded references. This one does, and needs no text encoder and no VAE encoder.

        Args:
            context: of the noise's batch, device and dtype.
            noise: (B, C, H / 16, W / 16).

        Returns:
            (B, C / 4, H / 8, W / 8), for `decode`.
        """
        height, width = (side * self.token_pixels for side in noise.shape[-2:])
        schedule = self.schedule(height, width, num_steps, noise.device)
        latents = few_step_sample(partial(self.predict_velocity, context=context), noise, schedule)
        return self.image_latents(latents)

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> list[PIL.Image.Image]:
        """Pictures of (B, C / 4, H / 8, W / 8) latents, decoded one at a time on the VAE's device."""
        images = []
        for one in latents.split(1):
            pixels = self.vae.decode(one.to(self.vae.device, self.vae.dtype), return_dict=False)[0]
            images += self.image_processor.postprocess(pixels, output_type="pil")
        return images


# The transformer shares positions over the batch; they are made once a size, not once a forward.
@lru_cache(maxsize=64)
def _text_ids(length: int, device: torch.device) -> torch.Tensor:
    """(L, 4) positions of the text tokens."""
    return Flux2KleinPipeline._prepare_text_ids(torch.empty(1, length, 0))[0].to(device)


@lru_cache(maxsize=64)
def _image_ids(
    size: tuple[int, int], reference_sizes: tuple[tuple[int, int], ...], device: torch.device
) -> torch.Tensor:
    """(S, 4) positions of the noisy tokens (T = 0), then of each reference's (T = 10, 20, ...)."""
    ids = [Flux2KleinPipeline._prepare_latent_ids(torch.empty(1, 0, *size))[0]]
    if reference_sizes:
        references = [torch.empty(1, 0, *reference_size) for reference_size in reference_sizes]
        ids.append(Flux2KleinPipeline._prepare_image_ids(references)[0])
    return torch.cat(ids).to(device)


def transformer_skeleton(name_or_path: str, **kwargs) -> Flux2Transformer2DModel:
    """The transformer on the meta device: its module names, without reading a weight."""
    config = Flux2Transformer2DModel.load_config(name_or_path, subfolder="transformer", **kwargs)
    with torch.device("meta"):
        return Flux2Transformer2DModel.from_config(config)
