"""What the making and the measuring of a miniature need to know of its model."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from diffusers import DiffusionPipeline, ModelMixin
from PIL import Image

from benchmarks.miniature.tasks import References
from pipelines.flux2_klein import KleinContext
from pipelines.z_image import ZImageContext


Context = KleinContext | ZImageContext


@dataclass(frozen=True)
class PassCosts:
    """Costs of passes of the transformer for one sample, relative to the student's forward pass.

    Attributes:
        forward_and_backward: with gradients of the activations and the adapters, not of the frozen weights.
        teacher: forward; its sequence has the picture's tokens as well.
        base: forward, without adapters.
        base_teacher: forward, with the picture's tokens and without adapters.
    """

    forward_and_backward: float
    teacher: float
    base: float
    base_teacher: float


class Architecture(ABC):
    """A model of which there is a miniature. "Tokens" are latents as (N, 8, 8, 64): a token per 8 x 8 pixels.

    Attributes:
        name: on the command line.
        title: name of the model.
        folder: the shipped miniature.
        script: that trains LoRAs for it.
        lora_layers: the script's default.
        costs: measured with torch's `FlopCounterMode` on the shipped miniature, LoRAs of rank 16.
        stock_pipeline_class: diffusers' own.
        pipeline_options: what it takes besides its components.
        num_steps: sampling steps that the miniature is distilled for, K.
        guidance_scale: of the stock pipeline at few steps.
        max_sequence_length: of its prompts, in tokens.
        slots: segments of the trajectory that a buffer of rows trains at the same time.
        entry_slots: the slots that new rows enter.
        num_substeps: of the teacher in each segment.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    folder: ClassVar[Path]
    script: ClassVar[Path]
    lora_layers: ClassVar[str]
    costs: ClassVar[PassCosts]
    stock_pipeline_class: ClassVar[type[DiffusionPipeline]]
    pipeline_options: ClassVar[dict]
    num_steps: ClassVar[int]
    guidance_scale: ClassVar[float]
    max_sequence_length: ClassVar[int]
    slots: ClassVar[tuple[int, ...]]
    entry_slots: ClassVar[tuple[int, ...]]
    num_substeps: ClassVar[int]

    @abstractmethod
    def load(self, folder: Path, **teacher_flags: str) -> DiffusionPipeline:
        """The miniature in this folder, as a pipeline with the methods that D-OPSD needs.

        Args:
            teacher_flags: the training script's, if they differ from its defaults.
        """

    @abstractmethod
    def script_flags(self, folder: Path) -> dict[str, object]:
        """Flags of the training script that the miniature in this folder needs."""

    @abstractmethod
    def picture_latents(self, pipeline: DiffusionPipeline, pictures: Sequence[Image.Image]) -> torch.Tensor:
        """(N, C, h, w), x0: the latents of pictures, as the pipeline samples them."""

    @abstractmethod
    def make_transformer(self) -> ModelMixin:
        """With random weights."""

    @abstractmethod
    def encode(self, vae: ModelMixin, pictures: torch.Tensor) -> torch.Tensor:
        """(N, 3, 64, 64), -1 to 1 -> tokens."""

    @abstractmethod
    def tokens(self, latents: torch.Tensor) -> torch.Tensor:
        """Tokens of the latents that the pipeline samples, (N, C, h, w)."""

    @abstractmethod
    def latents(self, tokens: torch.Tensor) -> torch.Tensor:
        """The inverse of `tokens`."""

    @abstractmethod
    def picture_context(
        self, pipeline: DiffusionPipeline, prompts: Sequence[str], pictures: Sequence[np.ndarray]
    ) -> Context:
        """For training: prompts with a picture each, (64, 64, 3), -1 to 1."""

    @abstractmethod
    def reference_context(
        self, pipeline: DiffusionPipeline, prompts: Sequence[str], references: References
    ) -> Context:
        """The teacher's: prompts with one picture each, or with equally many for each in a tuple."""

    @abstractmethod
    def join(self, contexts: Sequence[Context]) -> Context:
        """One batch of all the contexts' samples."""

    @abstractmethod
    def select(self, context: Context, indices: torch.Tensor) -> Context:
        """The samples with these indices."""

    def text_context(self, pipeline: DiffusionPipeline, prompts: Sequence[str]) -> Context:
        """The student's: prompts only."""
        return pipeline.encode_student(list(prompts), max_sequence_length=self.max_sequence_length)

    def velocity(
        self, pipeline: DiffusionPipeline, states: torch.Tensor, sigmas: torch.Tensor, context: Context
    ) -> torch.Tensor:
        """The pipeline's velocity at tokens (B, 8, 8, 64), each at its own sigma (B,). Float32."""
        return self.tokens(pipeline.predict_velocity(self.latents(states), 1000 * sigmas, context)).float()
