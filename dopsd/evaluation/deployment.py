"""The interface to a base model as it is deployed: all that a comparison knows of one."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from diffusers import DiffusionPipeline

from ..sizes import SizeLimits


@dataclass(frozen=True)
class Deployment:
    """A stock pipeline and how it is called.

    Attributes:
        name, example: of the model for messages, and a hub id of it.
        pipeline_class, transformer_class: of diffusers.
        is_distilled: whether a checkpoint with these contents of model_index.json and of the scheduler's
            configuration is step-distilled.
        num_inference_steps, guidance_scale: at which the checkpoint is deployed.
        negative_above: guidance scales above this one need the empty prompt as well.
        sizes: of pictures that it can draw.
        can_edit: whether it takes pictures to edit.
        works_in_fp16: whether it can be drawn with in this precision.
        count_tokens: (pipeline, prompt) -> tokens with the chat template, of which the pipeline drops those beyond
            its limit.
        encode: (pipeline, prompt, max_sequence_length) -> one prompt's embeddings, which need only the pipeline's
            tokenizer and text encoder.
        call_arguments: (embeddings of each prompt, those of the empty prompt or None) -> the pipeline's arguments for
            a batch.
    """

    name: str
    example: str
    pipeline_class: type[DiffusionPipeline]
    transformer_class: type
    is_distilled: Callable[[dict, dict], bool]
    num_inference_steps: int
    guidance_scale: float
    negative_above: float
    sizes: SizeLimits
    can_edit: bool
    works_in_fp16: bool
    count_tokens: Callable[[DiffusionPipeline, str], int]
    encode: Callable[[DiffusionPipeline, str, int], Any]
    call_arguments: Callable[[list[Any], Any], dict[str, Any]]

    @property
    def needs_negative(self) -> bool:
        return self.guidance_scale > self.negative_above
