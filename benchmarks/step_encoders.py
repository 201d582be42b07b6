"""Time of the encoders: the published loop runs them in every step, a run with a cache once per prompt and picture."""

import statistics
from functools import partial

import torch

from benchmarks.step_measure import Call, Device
from benchmarks.step_models import RandomModel


NUM_RUNS = 3


@torch.no_grad()
def measure_encoders(model: RandomModel, device: Device) -> dict[str, float]:
    """Seconds of wall time to encode what one step needs, each the median of a few runs.

    A `vlm` teacher's vision tower is left out; the text encoder reads as many tokens as with its picture.
    """
    seconds = prompt_seconds(model, device)
    if "vae" in model.model.teacher_context(model.settings([])).encoders:
        seconds["picture"] = picture_seconds(model, device)
    return seconds


def prompt_seconds(model: RandomModel, device: Device) -> dict[str, float]:
    text_encoder = model.make_text_encoder()
    seconds = {}
    for name, shape in (("student's prompt", model.size.student_text), ("teacher's prompt", model.size.teacher_text)):
        tokens = torch.zeros(1, shape[-2], dtype=torch.long, device=model.device)
        seconds[name] = median_seconds(device, partial(text_encoder, tokens, output_hidden_states=True))
    return seconds


def picture_seconds(model: RandomModel, device: Device) -> float:
    side = model.size.resolution
    pixels = torch.zeros(1, 3, side, side, dtype=model.dtype, device=model.device)
    seconds = median_seconds(device, partial(model.vae.to(model.device).encode, pixels))
    model.vae.to("cpu")
    return seconds


def median_seconds(device: Device, call: Call) -> float:
    call()
    return statistics.median(device.seconds(call).wall for _ in range(NUM_RUNS))
