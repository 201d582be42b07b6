"""How a checkpoint is deployed: its stock pipeline, its sampling steps and its guidance scale."""

import inspect
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from diffusers import (
    DiffusionPipeline,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)

from dopsd.evaluation.deployment import Deployment
from dopsd.loading import LOAD_ERRORS
from dopsd.pretrained import read_configs

from . import published
from .chat_template import apply_chat_template
from .flux2_klein import Flux2KleinDOPSDPipeline
from .z_image import ZImageDOPSDPipeline, is_turbo


def count_tokens(pipeline: DiffusionPipeline, prompt: str, enable_thinking: bool) -> int:
    return len(
        pipeline.tokenizer(apply_chat_template(pipeline.tokenizer, prompt, enable_thinking=enable_thinking)).input_ids
    )


# FLUX.2-klein


def encode_klein(pipeline: Flux2KleinPipeline, prompt: str, max_sequence_length: int) -> torch.Tensor:
    """(1, L, D)"""
    return pipeline.encode_prompt([prompt], max_sequence_length=max_sequence_length)[0]


def klein_arguments(embeds: list[torch.Tensor], negative: torch.Tensor | None) -> dict[str, Any]:
    arguments = {"prompt_embeds": torch.cat(embeds)}
    if negative is not None:
        arguments["negative_prompt_embeds"] = negative.expand(len(embeds), -1, -1)
    return arguments


# Z-Image


def encode_z_image(pipeline: ZImagePipeline, prompt: str, max_sequence_length: int) -> torch.Tensor:
    """(L, D), without padding."""
    # The stock method writes the chat text into the list.
    embeds, _ = pipeline.encode_prompt(
        [prompt], do_classifier_free_guidance=False, max_sequence_length=max_sequence_length
    )
    return embeds[0]


def z_image_arguments(embeds: list[torch.Tensor], negative: torch.Tensor | None) -> dict[str, Any]:
    arguments = {"prompt_embeds": list(embeds)}
    if negative is not None:
        arguments["negative_prompt_embeds"] = [negative] * len(embeds)
    return arguments


MODELS = {
    model.pipeline_class.__name__: model
    for model in (
        Deployment(
            name="FLUX.2-klein",
            example="black-forest-labs/FLUX.2-klein-4B",
            pipeline_class=Flux2KleinPipeline,
            transformer_class=Flux2Transformer2DModel,
            is_distilled=lambda index, scheduler: bool(index.get("is_distilled")),
            num_inference_steps=published.KLEIN_STEPS,
            guidance_scale=1.0,
            negative_above=1.0,
            sizes=published.KLEIN_SIZES,
            can_edit=True,
            works_in_fp16=True,
            count_tokens=partial(count_tokens, enable_thinking=Flux2KleinDOPSDPipeline.enable_thinking),
            encode=encode_klein,
            call_arguments=klein_arguments,
        ),
        Deployment(
            name="Z-Image",
            example="Tongyi-MAI/Z-Image-Turbo",
            pipeline_class=ZImagePipeline,
            transformer_class=ZImageTransformer2DModel,
            is_distilled=lambda index, scheduler: is_turbo(scheduler),
            num_inference_steps=published.Z_IMAGE_STEPS,
            guidance_scale=0.0,
            negative_above=0.0,
            sizes=published.Z_IMAGE_SIZES,
            can_edit=False,
            works_in_fp16=False,
            count_tokens=partial(count_tokens, enable_thinking=ZImageDOPSDPipeline.enable_thinking),
            encode=encode_z_image,
            call_arguments=z_image_arguments,
        ),
    )
}


def find_deployment(name_or_path: str, **kwargs: Any) -> Deployment:
    """How the checkpoint is deployed, from its model_index.json and its scheduler alone.

    A checkpoint that is not step-distilled has its stock pipeline's defaults.

    Args:
        name_or_path: hub id or folder.
        kwargs: passed to `load_config`, such as revision and cache_dir.

    Raises:
        InputError: there is no such checkpoint, or it belongs to another model.
    """
    try:
        kind = DiffusionPipeline.load_config(name_or_path, **kwargs).get("_class_name")
    except LOAD_ERRORS:
        kind = None  # `read_configs` says why.
    model = MODELS.get(kind) or next(iter(MODELS.values()))
    names = " or ".join(one.name for one in MODELS.values())
    examples = " or ".join(one.example for one in MODELS.values())
    index, scheduler = read_configs(name_or_path, model.pipeline_class, model=names, example=examples, **kwargs)
    if model.is_distilled(index, scheduler):
        return model
    defaults = inspect.signature(model.pipeline_class.__call__).parameters
    return replace(model, **{name: defaults[name].default for name in ("num_inference_steps", "guidance_scale")})
