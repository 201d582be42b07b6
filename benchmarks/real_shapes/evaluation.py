"""`evaluate_lora.py` on a LoRA that a run has left, with feature models of published shapes and random weights."""

import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import (
    BitImageProcessorPil,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPSegConfig,
    CLIPSegForImageSegmentation,
    Dinov2Config,
    Dinov2Model,
    PreTrainedModel,
    ViTImageProcessorPil,
)

from benchmarks.miniature.feature_models import make_tokenizer
from benchmarks.miniature.files import REPOSITORY, replacing
from benchmarks.real_shapes.runs import last_line


# Arguments of the parts' configurations: those of the flags' defaults, and small ones for a CPU.
LAYERS = {
    "text": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
    "clip": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "patch_size": 14,
    },
    "dino": {"image_size": 518, "patch_size": 14},
    "mask text": {},
    "mask": {"patch_size": 16},
}
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
SMALL_LAYERS = {
    "text": SMALL | {"num_hidden_layers": 1},
    "clip": SMALL | {"num_hidden_layers": 1, "patch_size": 56},
    "dino": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 224, "patch_size": 56},
    "mask text": SMALL | {"num_hidden_layers": 1},
    "mask": SMALL | {"num_hidden_layers": 10, "patch_size": 44, "image_size": 352},  # layers 3, 6 and 9 are read
}
SIZES = {"clip_model": 224, "dino_model": 224, "mask_model": 352}  # pixels
PROCESSORS = {
    "clip_model": CLIPImageProcessorPil,
    "dino_model": BitImageProcessorPil,
    "mask_model": ViTImageProcessorPil,
}
# Flags of the comparisons, one after the other in the same folder.
EVALUATIONS = (
    ["--num_seeds", "2", "--strengths", "0.5"],
    ["--num_seeds", "1", "--seed", "100", "--strengths", "1", "--enable_model_cpu_offload"],
)
DREW = re.compile(r"Drew (\d+) of")
COST = re.compile(r"(Drawing|Measuring) took ([\d.]+) s, with a peak of ([\d.]+) GB")


@dataclass
class Evaluation:
    """What was measured of a comparison.

    Attributes:
        flags: those that were added.
        error: last line of one that failed.
        num_drawn: pictures.
        drawing_seconds, measuring_seconds: of the stage, with loading its models.
        drawing_gb, measuring_gb: most GPU memory that the stage had allocated; on a CPU, resident memory.
        run_seconds: of the whole command.
    """

    flags: list[str] = field(default_factory=list)
    error: str | None = None
    num_drawn: int | None = None
    drawing_seconds: float | None = None
    drawing_gb: float | None = None
    measuring_seconds: float | None = None
    measuring_gb: float | None = None
    run_seconds: float | None = None


def make_feature_models(folder: Path, device: torch.device, *, is_small: bool) -> None:
    """Writes what is missing, each to a subfolder called like its flag. Weights are made on the device.

    Args:
        is_small: whether a CPU is to measure with them.
    """
    layers, tokenizer = SMALL_LAYERS if is_small else LAYERS, make_tokenizer()
    makers: dict[str, Callable[[], PreTrainedModel]] = {
        "clip_model": lambda: CLIPModel(
            CLIPConfig(text_config=layers["text"], vision_config=layers["clip"], projection_dim=768)
        ),
        "dino_model": lambda: Dinov2Model(Dinov2Config(**layers["dino"])),
        "mask_model": lambda: CLIPSegForImageSegmentation(
            CLIPSegConfig(
                text_config=layers["mask text"], vision_config=layers["mask"], use_complex_transposed_convolution=True
            )
        ),
    }
    for name, make in makers.items():
        if not (folder / name).exists():
            with replacing(folder / name) as unfinished, torch.device(device):
                make().save_pretrained(unfinished)
                PROCESSORS[name](**sizes(name)).save_pretrained(unfinished)
                tokenizer.save_pretrained(unfinished)


def sizes(name: str) -> dict[str, dict[str, int]]:
    """Arguments of the model's processor."""
    square = {"height": SIZES[name], "width": SIZES[name]}
    return {"size": square} if name == "mask_model" else {"size": {"shortest_edge": SIZES[name]}, "crop_size": square}


def evaluate(
    lora: Path, checkpoint: Path, photographs: Path, folder: Path, side: int, flags: list[str], log: Path
) -> Evaluation:
    """Runs the command.

    Args:
        folder: of the feature models; the comparison is written to its subfolder "comparison".
        side: of the pictures, in pixels.
        flags: more of them.
        log: file for what it prints.
    """
    own = {name: folder / name for name in SIZES} | {
        "pretrained_model_name_or_path": checkpoint,
        "lora": lora,
        "instance_data_dir": photographs,
        "resolution": side,
        "output_dir": folder / "comparison",
    }
    pairs = [text for flag, value in own.items() for text in (f"--{flag}", str(value))]
    fixed = ["--kind", "pet", "--trigger_word", "sks=corgi", "--mask_background", "--num_prompts", "2"]
    command = [sys.executable, str(REPOSITORY / "evaluate_lora.py"), *pairs, *fixed, *flags]
    result, began = Evaluation(flags), time.perf_counter()
    with open(log, "w") as output:
        status = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT).returncode
    result.run_seconds = time.perf_counter() - began
    text = log.read_text(errors="replace")
    if status:
        result.error = f"exit status {status}: {last_line(log)}"
    if drew := DREW.search(text):
        result.num_drawn = int(drew[1])
    costs = {stage: (float(seconds), float(peak)) for stage, seconds, peak in COST.findall(text)}
    result.drawing_seconds, result.drawing_gb = costs.get("Drawing", (None, None))
    result.measuring_seconds, result.measuring_gb = costs.get("Measuring", (None, None))
    return result
