"""The interface between `dopsd/` and a model: all that `dopsd/` knows of one.

A training script subclasses `Model` and `Encoder`; a pipeline in `pipelines/` offers the verbs of `FewStepPipeline`.
docs/add_a_model.md explains how.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, Self

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from transformers import PretrainedConfig

from .model_card import CardInfo
from .model_flags import ModelFlags
from .rollout import Schedule
from .settings import Settings


Size = tuple[int, int]  # (height, width) of a picture in pixels


class Context(Protocol):
    """What the transformer is conditioned on, for a batch of samples."""

    def to(self, device: torch.device, non_blocking: bool = False) -> Self: ...

    def pin_memory(self) -> Self: ...


class FewStepPipeline(Protocol):
    """A stock diffusers pipeline plus the methods that D-OPSD needs. (C, h, w) are the transformer's own latents.

    Attributes:
        latents_dtype: dtype in which the stock pipeline takes its steps.
    """

    transformer: torch.nn.Module
    text_encoder: torch.nn.Module | None
    tokenizer: Any
    vae: torch.nn.Module
    latents_dtype: torch.dtype

    def chat_token_count(self, content: str) -> int:
        """Tokens of a prompt with the chat template, if there is one."""

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(C, h, w) of one sample's latents for an image of that many pixels."""

    def schedule(self, height: int, width: int, num_steps: int, device: torch.device | None = None) -> Schedule:
        """The steps that the stock pipeline takes at that image size."""

    def predict_velocity(self, latents: torch.Tensor, timestep: torch.Tensor, context: Any) -> torch.Tensor:
        """noise - x0, (B, C, h, w), at a timestep of the schedule, a scalar or one per sample."""

    def sample(self, context: Any, noise: torch.Tensor, num_steps: int) -> torch.Tensor:
        """What the stock pipeline returns for `output_type="latent"`, from (B, C, h, w) noise."""

    def image_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents for `decode` from (B, C, h, w)."""

    def decode(self, latents: torch.Tensor) -> list[Image.Image]:
        """One image per sample, decoded on the VAE's device."""

    def picture_latents(self, picture: Image.Image) -> torch.Tensor:
        """(C, h, w), the VAE's latents of a picture, encoded on the VAE's device, by which pictures are compared."""


class VisionTower(Protocol):
    """Joins the vision tower of a vision-language model to the pipeline's text encoder."""

    def files(self) -> dict[str, Path]:
        """The files that encodings depend on."""

    def num_image_tokens(self, height: int, width: int) -> int:
        """Tokens of a picture of that many pixels."""

    def num_parameters(self) -> int:
        """Of the tower, without reading its weights."""

    def content(self, prompt: str, *num_image_tokens: int) -> str:
        """The user's message: each picture's tokens, then the prompt."""

    def features(self, picture: Image.Image) -> torch.Tensor:
        """(D,), what the tower makes of a picture as a whole. Called after `load`."""

    def load(self, text_encoder: torch.nn.Module) -> None: ...

    def unload(self) -> None: ...


class Encoder:
    """Turns a prompt, pictures, or both into one tensor of a context.

    Attributes:
        name: identifies the encoder in cache keys, so it is unique among a run's encoders.
        noun: what it encodes, in the plural, for progress bars and log lines.
        component: the model that it needs on the accelerator.
        reads_prompt, sees_picture: what its encodings depend on. One that does both sees all of a sample's pictures:
            those to edit, then the result. One that only sees pictures gets them one by one.
        has_tower: whether it has `picture_features`.
    """

    name: ClassVar[str]
    noun: ClassVar[str]
    component: ClassVar[Literal["text_encoder", "vae"]]
    reads_prompt: ClassVar[bool] = True
    sees_picture: ClassVar[bool] = False
    has_tower: ClassVar[bool] = False

    def encode(self, prompt: str, pictures: Sequence[Image.Image]) -> torch.Tensor:
        """The encoding of one sample, on the component's device."""
        raise NotImplementedError

    def encode_batch(self, prompts: list[str]) -> list[torch.Tensor]:
        """The encodings of prompts with equal `batch_length`. Called if it has one, and sees no picture."""
        return [self.encode(prompt, ()) for prompt in prompts]

    def batch_length(self, prompt: str) -> int | None:
        """Tokens that the text encoder computes for a prompt, with padding; None to encode each prompt by itself.

        Only prompts of equal length are encoded together, so that none is padded because of another: its encoding does
        not depend on the others, but for the rounding of matrix products of another size.
        """
        return None

    def shape(self, prompt: str, sizes: Sequence[Size]) -> tuple[int, ...]:
        """Shape of `encode`'s result for pictures of these sizes, without encoding them."""
        raise NotImplementedError

    def num_tokens(self, prompt: str, sizes: Sequence[Size]) -> int:
        """Tokens of the text with chat template and pictures, before truncation. Called if it reads prompts."""
        raise NotImplementedError

    def cache_key(self) -> list[Any]:
        """What encodings depend on besides the checkpoint, prompt and picture (see `context_cache.content_key`)."""
        return []

    def size_flags(self) -> tuple[str, ...]:
        """Flags whose lower values make encodings smaller."""
        return ()

    def identity(self) -> dict[str, str]:
        """`--flag` -> fingerprint of the files that it names, which a resumed run must share with its checkpoint."""
        return {}

    def picture_features(self, picture: Image.Image) -> torch.Tensor:
        """(D,), what a vision tower makes of a picture as a whole. Called while it is attached."""
        raise NotImplementedError

    def attach(self) -> None:
        """Called after the pipeline's text encoder is loaded and on the accelerator."""

    def detach(self) -> None:
        """Called before the pipeline's text encoder is freed."""


@dataclass(frozen=True)
class TokenLimit:
    """Longest text in tokens, and the flag that sets it."""

    flag: str
    tokens: int


@dataclass(frozen=True)
class Conditioning:
    """What student and teacher are conditioned on in one run.

    Attributes:
        student, teacher: the encoders whose tensors make up a sample's context. The student's read prompts only.
        stack: a batch's context from its samples' tensors, one tuple per sample, one tensor per encoder.
        student_limit, teacher_limit: longer texts are refused.
        cond_encoder: encodes the pictures to edit, for both of them; their tensors come after those of the prompts.
            None if the model cannot edit.
    """

    student: tuple[Encoder, ...]
    teacher: tuple[Encoder, ...]
    stack: Callable[[list[tuple[torch.Tensor, ...]]], Context]
    student_limit: TokenLimit
    teacher_limit: TokenLimit
    cond_encoder: Encoder | None = None

    def __post_init__(self) -> None:
        names = [encoder.name for encoder in self.encoders]
        assert len(names) == len({*names}), f"two encoders share a name, and so their cache entries: {names}"

    @property
    def encoders(self) -> tuple[Encoder, ...]:
        cond = () if self.cond_encoder is None else (self.cond_encoder,)
        return tuple(dict.fromkeys(self.student + self.teacher + cond))

    @property
    def teacher_sees_picture(self) -> bool:
        return any(encoder.sees_picture for encoder in self.teacher)


class Model(ModelFlags, ABC):
    """A few-step model, as its training script describes it.

    Attributes:
        pipeline_class: a `FewStepPipeline`.
        stock_pipeline_class: the diffusers pipeline that it extends, which loads the saved LoRA.
        transformer_class, text_encoder_class, vae_class: of its components.
        portable_lora_layers: regular expression for the modules whose LoRA other software can load; None if unknown.
        card: what the model card says of it.
        tracker_name: project name for the trackers.
        masks_attention: True if the transformer masks tokens when a batch's prompts differ in length.
        works_in_fp16: False if activations of the published weights are known to overflow in float16.
    """

    pipeline_class: ClassVar[type]
    stock_pipeline_class: ClassVar[type[DiffusionPipeline]]
    transformer_class: ClassVar[type]
    text_encoder_class: ClassVar[type]
    vae_class: ClassVar[type]
    portable_lora_layers: ClassVar[str | None] = None
    card: ClassVar[CardInfo]
    tracker_name: ClassVar[str]
    masks_attention: ClassVar[bool] = False
    works_in_fp16: ClassVar[bool] = True

    @abstractmethod
    def is_distilled(self, index: dict, scheduler: dict) -> bool:
        """Whether the checkpoint is a few-step model, by its model_index.json and scheduler configuration."""

    @abstractmethod
    def resolve_settings(
        self, settings: Settings, transformer_config: dict, text_config: PretrainedConfig
    ) -> Settings:
        """The settings with the defaults that follow from the checkpoint.

        Raises:
            InputError: a setting does not fit the checkpoint, or its components do not fit each other.
        """

    @abstractmethod
    def conditioning(
        self, pipeline: FewStepPipeline, text_config: PretrainedConfig, settings: Settings
    ) -> Conditioning:
        """What student and teacher are conditioned on.

        Args:
            pipeline: without its text encoder and transformer, which are loaded later.
        """
