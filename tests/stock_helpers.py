"""Comparisons with what a stock pipeline draws."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline

from benchmarks.miniature import world
from benchmarks.miniature.architecture import Architecture
from dopsd.model import FewStepPipeline
from dopsd.rollout import seeded_noise


def assert_decodes_as_stock(
    pipeline: FewStepPipeline,
    stock: DiffusionPipeline,
    prompt: str,
    *,
    guidance_scale: float,
    max_sequence_length: int,
) -> None:
    """Images sampled and decoded as a batch of two are those of the stock pipeline, up to rounding."""
    noise = seeded_noise(pipeline.latent_shape(64, 64), [0, 1])
    context = pipeline.encode_student([prompt] * 2, max_sequence_length=max_sequence_length)
    images = pipeline.decode(pipeline.sample(context, noise, 2))
    for seed, image in enumerate(images):
        expected = stock(
            prompt=prompt,
            height=64,
            width=64,
            num_inference_steps=2,
            guidance_scale=guidance_scale,
            generator=torch.Generator().manual_seed(seed),
            max_sequence_length=max_sequence_length,
        ).images[0]
        # A batch of two is rounded differently.
        assert abs(np.asarray(image).astype(int) - np.asarray(expected)).max() <= 1


def draw_miniature(
    pipeline: DiffusionPipeline, architecture: Architecture, seeds: Iterable[int], **arguments: Any
) -> torch.Tensor:
    """(N, 3, 64, 64), -1 to 1: what a miniature's stock pipeline draws, by default at its deployed number of steps."""
    settings = {
        "height": world.SIDE,
        "width": world.SIDE,
        "num_inference_steps": architecture.num_steps,
        "guidance_scale": architecture.guidance_scale,
        "max_sequence_length": architecture.max_sequence_length,
        "generator": [torch.Generator().manual_seed(seed) for seed in seeds],
        "output_type": "pt",
    }
    return 2 * pipeline(**settings | arguments).images - 1
