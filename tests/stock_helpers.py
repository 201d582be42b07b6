"""Comparisons with what a stock pipeline draws."""

import numpy as np
import torch
from diffusers import DiffusionPipeline

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
