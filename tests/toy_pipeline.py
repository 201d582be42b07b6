"""A toy model: the part of docs/add_a_model.md that goes into `pipelines/`, and a checkpoint of it.

A latent token is the mean colour of 16 x 16 pixels. The transformer sees each token by itself, with the prompt's mean
embedding and, as the teacher, the target picture's token.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from diffusers import ConfigMixin, DiffusionPipeline, FlowMatchEulerDiscreteScheduler, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.loaders import PeftAdapterMixin, ZImageLoraLoaderMixin
from PIL import Image
from transformers import Qwen3Config, Qwen3Model

from benchmarks.miniature.parts import byte_tokenizer
from dopsd.rollout import Schedule, few_step_sample


class ToyTransformer(ModelMixin, ConfigMixin, PeftAdapterMixin):
    @register_to_config
    def __init__(self, width: int = 16):
        super().__init__()
        self.linear_in = torch.nn.Linear(3 + 3 + 1 + width, 64)
        self.linear_out = torch.nn.Linear(64, 3)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.linear_out(self.linear_in(tokens).tanh())


class ToyVAE(ModelMixin, ConfigMixin):
    @register_to_config
    def __init__(self, side: int = 16):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))

    def encode(self, image: Image.Image) -> torch.Tensor:
        pixels = torch.tensor(list(image.getdata()), dtype=torch.float32).view(1, image.height, image.width, 3)
        return torch.nn.functional.avg_pool2d(pixels.permute(0, 3, 1, 2) / 127.5 - 1, self.config.side) * self.scale

    def decode(self, latents: torch.Tensor) -> list[Image.Image]:
        pixels = ((latents / self.scale + 1) * 127.5).clamp(0, 255).byte().permute(0, 2, 3, 1).numpy(force=True)
        return [Image.fromarray(one).resize((one.shape[1] * 16, one.shape[0] * 16)) for one in pixels]


@dataclass(frozen=True)
class ToyContext:
    prompts: torch.Tensor  # (B, width)
    pictures: torch.Tensor | None = None  # (B, 3, h, w)

    @classmethod
    def stack(cls, samples: list[tuple[torch.Tensor, ...]]) -> "ToyContext":
        return cls(*(torch.cat(parts) for parts in zip(*samples, strict=True)))

    def to(self, device: torch.device, non_blocking: bool = False) -> "ToyContext":
        return self._each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "ToyContext":
        return self._each(torch.Tensor.pin_memory)

    def _each(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "ToyContext":
        return ToyContext(function(self.prompts), None if self.pictures is None else function(self.pictures))


class ToyPipeline(DiffusionPipeline, ZImageLoraLoaderMixin):
    latents_dtype = torch.float32

    def __init__(self, scheduler, vae, text_encoder, tokenizer, transformer):
        super().__init__()
        self.register_modules(
            scheduler=scheduler, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, transformer=transformer
        )

    def chat_token_count(self, prompt: str) -> int:
        return len(self.tokenizer(prompt).input_ids)

    @torch.no_grad()
    def encode_prompt(self, prompt: str) -> torch.Tensor:
        ids = self.tokenizer(prompt, return_tensors="pt").input_ids
        return self.text_encoder(ids).last_hidden_state.mean(dim=1)

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        return 3, height // 16, width // 16

    def schedule(self, height: int, width: int, num_steps: int, device=None) -> Schedule:
        self.scheduler.set_timesteps(num_steps, device=device)
        return Schedule(self.scheduler.sigmas.clone(), self.scheduler.timesteps.clone())

    def predict_velocity(self, latents: torch.Tensor, timestep: torch.Tensor, context: ToyContext) -> torch.Tensor:
        batch, _, height, width = latents.shape
        pictures = torch.zeros_like(latents) if context.pictures is None else context.pictures
        prompts = context.prompts[:, :, None, None].expand(-1, -1, height, width)
        time = (timestep / 1000).reshape(-1, 1, 1, 1).expand(batch, 1, height, width)
        tokens = torch.cat([latents, pictures, time, prompts], dim=1).permute(0, 2, 3, 1)
        return self.transformer(tokens).permute(0, 3, 1, 2)

    def sample(self, context: ToyContext, noise: torch.Tensor, num_steps: int) -> torch.Tensor:
        schedule = self.schedule(*(16 * side for side in noise.shape[-2:]), num_steps, noise.device)
        return few_step_sample(partial(self.predict_velocity, context=context), noise, schedule)

    def image_latents(self, latents: torch.Tensor) -> torch.Tensor:
        return latents

    def decode(self, latents: torch.Tensor) -> list[Image.Image]:
        return self.vae.decode(latents)

    @torch.no_grad()
    def picture_latents(self, picture: Image.Image) -> torch.Tensor:
        return self.vae.encode(picture)[0]


def make_toy(folder: Path) -> Path:
    """Writes a checkpoint with random weights."""
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=16,
    )
    pipeline = ToyPipeline(
        FlowMatchEulerDiscreteScheduler(), ToyVAE(), Qwen3Model(config), tokenizer, ToyTransformer()
    )
    pipeline.save_pretrained(folder)
    return folder
