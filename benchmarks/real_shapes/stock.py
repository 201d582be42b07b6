"""What a run has trained, loaded and drawn by the stock pipeline."""

from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from dopsd.errors import DOPSDError
from dopsd.model import Model
from dopsd.output import LORA_FILE


PROMPT = "a lighthouse on a cliff at sunset"


class WrongPicture(DOPSDError):
    """A picture is not finite, or what was trained does not change it."""


@torch.no_grad()
def drawn_change(model: Model, checkpoint: Path, trained: Path, side: int, device: torch.device) -> float:
    """How much the trained weights change a picture: the mean absolute difference of values from 0 to 1.

    Args:
        trained: output folder of a run: with a LoRA, or a whole pipeline.

    Raises:
        WrongPicture: a picture has values that are not finite, or differs no more than two drawn by the base model.
    """

    def load(folder: Path) -> DiffusionPipeline:
        pipeline = model.stock_pipeline_class.from_pretrained(folder, dtype=torch.bfloat16).to(device)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def draw(pipeline: DiffusionPipeline) -> torch.Tensor:
        picture = pipeline(
            prompt=PROMPT,
            height=side,
            width=side,
            num_inference_steps=model.default_settings["num_inference_steps"],
            guidance_scale=model.card.guidance_scale,
            generator=torch.Generator().manual_seed(0),
            output_type="np",
        ).images[0]
        return torch.from_numpy(picture)

    pipeline = load(checkpoint)
    base, again = draw(pipeline), draw(pipeline)
    if (trained / LORA_FILE).exists():
        pipeline.load_lora_weights(trained, weight_name=LORA_FILE)
    else:
        del pipeline
        pipeline = load(trained)
    picture = draw(pipeline)
    if not all(one.isfinite().all() for one in (base, picture)):
        raise WrongPicture("a picture of the stock pipeline has values that are not finite")
    change, noise = ((one - base).abs().mean().item() for one in (picture, again))
    if change <= noise:
        raise WrongPicture(f"the picture changes by {change:.1e}; without the trained weights by {noise:.1e}")
    return change
