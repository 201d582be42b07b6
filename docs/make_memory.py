"""Writes memory.md, the page of memory computed for the published models: python -m docs.make_memory

Each figure is what `--dry_run` computes, from folders with the published configurations and without weights.
"""

import json
import shutil
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from accelerate import PartialState
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image
from safetensors.torch import save_file
from transformers import Qwen3Config, Qwen3VLConfig, Qwen3VLVisionConfig

import train_dopsd_flux2
import train_dopsd_zimage
from dopsd.command_line import parse_settings, preset_names
from dopsd.planner.advice import Suggestion, suggestions
from dopsd.planner.cards import MEMORY_SIZES, RESERVED_BYTES, RESERVED_SHARE, Card
from dopsd.planner.plan import Plan, Planner
from dopsd.planner.reading import read_run
from dopsd.settings import Settings
from pipelines.published_shapes import SHAPES, PublishedShape
from pipelines.vision_encoder import LANGUAGE_FIELDS


PAGE, ROOT = Path(__file__).with_name("memory.md"), Path(__file__).parents[1]
TOKENIZER = ROOT / "benchmarks/miniature/model/tokenizer"
SCRIPTS = {script.__name__: script for script in (train_dopsd_flux2, train_dopsd_zimage)}
NAMES = {"klein-4b": "klein-4B", "klein-9b": "klein-9B", "z-image": "Z-Image-Turbo"}
RESOLUTIONS = (512, 768, 1024)
WEIGHTS = {
    "bf16": {},
    "int8": {"quantize": "int8"},
    "NF4": {"quantize": "nf4"},
    "offload": {"offload_transformer": True},
}
# Of whole models: how they are trained.
UPDATES = {
    "": {},
    "--use_8bit_adam": {"use_8bit_adam": True},
    "--bf16_update stochastic_rounding": {"bf16_update": "stochastic_rounding"},
    "--use_8bit_adam --bf16_update stochastic_rounding": {
        "use_8bit_adam": True,
        "bf16_update": "stochastic_rounding",
    },
}
WHOLE_HEAD = ["", "", "copies on the GPU", "in host memory", "which holds; moved per step", "4 GPUs", "8 GPUs"]
CAPTION = "a photo of a corgi on the beach"
PREPROCESSOR = {
    "size": {"longest_edge": 16777216, "shortest_edge": 65536},
    "patch_size": 16,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.5] * 3,
    "image_std": [0.5] * 3,
    "image_processor_type": "Qwen2VLImageProcessorFast",
}


PAGE_TEXT = """\
# Memory

Computed, but for the last table. `python -m docs.make_memory` makes this page: it runs the training step of the
published models on tensors without numbers. `--dry_run` prints the same for your own flags and pictures, with time and
disk:

```bash
python train_dopsd_flux2.py --dry_run --card rtx-4090 --mixed_precision bf16 --gradient_checkpointing \\
  --pretrained_model_name_or_path black-forest-labs/FLUX.2-klein-4B \\
  --instance_data_dir my_photos --instance_prompt "a photo of sks corgi" --trigger_word "sks=a"
```

A cell is the peak in GB (10^9 bytes), and the smallest card, of {cards} GB, that it fits on. {reserve} and {share}
are left to CUDA and to gaps between tensors. If it does not fit, `--dry_run` says which flags make it fit.

## Training

Default flags with `--gradient_checkpointing --mixed_precision bf16`: rank 64, one picture per step, prior
preservation, AdamW. Previews and validation are included. The number after a model is the resolution.

{training}

int8 and NF4 are `--quantize int8` and `--quantize nf4`. Offload is `--offload_transformer`, which keeps the other
weights in host memory and is the slowest. `--use_8bit_adam` and `--offload_activations` save more. The TFLOP of a
step are a mean over the states that are drawn; a GPU reaches about half of its rate. Encoding, which comes before,
may need a larger card than training: see the next table.

## Encoding, before training

The text encoder is used first and leaves before the transformer comes. Where it does not fit, pass
`--quantize_text_encoder`, with which it needs less, or fill the cache with `--encode_only` on another machine.

{encoding}

## Whole models

`--train_mode full` with `--mixed_precision bf16 --gradient_checkpointing`, at 1024 pixels; the rest as above. On one
GPU, the teacher's average and the base model's weights are on the GPU (`--ema_device cuda`) or in host memory (`cpu`);
`auto` takes the GPU if there is room. Several GPUs share the model by `--fsdp`, copies included; the figures are for
each of them.

{whole}

The middle column is for copies in host memory: what the run then takes there, the model that is being saved included,
and what a step moves to the GPU and back, at about 25 GB/s: the average and the base model for their calls, and the
average there and back to be updated.

{verdict}

What `--dry_run` advises to add to `--train_mode full --mixed_precision bf16 --gradient_checkpointing` on other cards:

{whole_advice}

## Presets

`--preset 8gb`, `12gb`, `16gb`, `24gb`, `48gb` or `80gb` reads flags from `configs/presets/`. A `--config` file and
the command line win over it. Their peaks in GB, encoding included:

{presets}

What `--dry_run` advises to add where a model is too large. A cell's lines are alternatives:

{advice}

## Measured

On one H200 with torch 2.11, random weights of the published shapes, 1024 pixels, bf16, one picture per step, prior
preservation ([`benchmarks.real_shapes`](memory_and_speed.md#on-your-gpu)); whole models with `--train_mode full` and
`--gradient_checkpointing`. Times with a star are of runs that shared the GPU with another one, and say little. To add
a row, run `--dry_run`, train some steps on the same card, and open an issue with the card, the command, what
`--dry_run` printed, and `peak_memory_gb` and `seconds_per_step` from `metrics.jsonl`.

| card | model and flags | computed, GB | measured, GB | seconds per step |
|---|---|---|---|---|
| H200 | klein-4B | 25.4 | 25.5 | 1.04 |
| H200 | klein-4B, `--compile` | 25.4 | 23.4 | 0.81 |
| H200 | klein-4B, editing: `--cond_image_column` | 39.2 | 38.8 | 1.73 |
| H200 | klein-4B, `--teacher_context vlm` | 25.4 | 25.5 | 1.1\\* |
| H200 | klein-4B, `--quantize int8` | 21.9 | 21.7 | 1.4\\* |
| H200 | klein-4B, `--quantize nf4` | 20.1 | 20.0 | 1.1\\* |
| H200 | klein-4B, `--offload_transformer --gradient_checkpointing` | 4.6 | 4.3 | 2.5\\* |
| H200 | Z-Image-Turbo (`vlm`) | 52.7 | 52.3 | 1.71 |
| H200 | klein-4B, whole: `--use_8bit_adam --bf16_update stochastic_rounding` | 48.4 | 48.4 | 1.33 |
| H200 | the same with `--ema_device cpu --num_trained_states 4` (three steps) | 27.2 | 26.8 | 4.9\\* |
"""


def write_checkpoint(shape: PublishedShape, folder: Path) -> Path:
    """Writes a checkpoint's configurations and a small tokenizer: all that is read of it before its weights."""
    model = SCRIPTS[shape.script].MODEL
    text_config = Qwen3Config(**shape.text_encoder, architectures=[model.text_encoder_class.__name__])
    with torch.device("meta"):
        model.transformer_class(**shape.transformer).save_config(folder / "transformer")
        model.vae_class(**shape.vae).save_config(folder / "vae")
    FlowMatchEulerDiscreteScheduler(**shape.scheduler).save_config(folder / "scheduler")
    text_config.save_pretrained(folder / "text_encoder")
    shutil.copytree(TOKENIZER, folder / "tokenizer")
    index = {
        "_class_name": model.stock_pipeline_class.__name__,
        "is_distilled": True,
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", model.text_encoder_class.__name__],
        "tokenizer": ["transformers", "Qwen2TokenizerFast"],
        "transformer": ["diffusers", model.transformer_class.__name__],
        "vae": ["diffusers", model.vae_class.__name__],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def write_vlm(shape: PublishedShape, folder: Path) -> Path:
    """Writes a vision-language model's configurations, and a weight file that holds none of its weights."""
    text = Qwen3Config(**shape.text_encoder)
    sections = {"rope_type": "default", "rope_theta": 5e6, "mrope_interleaved": True, "mrope_section": [24, 20, 20]}
    text_config = {name: getattr(text, name) for name in LANGUAGE_FIELDS} | {"rope_parameters": sections}
    vision_config = Qwen3VLVisionConfig(**shape.vision_tower).to_dict()
    Qwen3VLConfig(text_config=text_config, vision_config=vision_config).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    save_file({"model.visual.none": torch.zeros(1)}, folder / "model.safetensors")
    return folder


@cache
def planner(name: str) -> Planner:
    """Of a model of `SHAPES`, with the script's default flags in bf16, on one picture of 1024 x 1024 pixels."""
    PartialState()
    shape = SHAPES[name]
    model = SCRIPTS[shape.script].MODEL
    with TemporaryDirectory() as parent:
        folder = write_checkpoint(shape, Path(parent, "checkpoint"))
        (folder / "photos").mkdir()
        Image.new("RGB", (1024, 1024)).save(folder / "photos/picture.png")
        flags = {
            "pretrained_model_name_or_path": folder,
            "instance_data_dir": folder / "photos",
            "instance_prompt": CAPTION,
            "mixed_precision": "bf16",
            "seed": 0,
        }
        if "vlm" in model.teacher_context(default_settings(name)).encoders:
            flags["vlm_model_name_or_path"] = write_vlm(shape, Path(parent, "vlm"))
        settings = parse_settings(model, "", [f"--{flag}={value}" for flag, value in flags.items()])
        return Planner(read_run(settings, model), on_gpu=True)


def default_settings(name: str, *flags: str) -> Settings:
    """Of the model's script, with these flags."""
    needed = "--pretrained_model_name_or_path", "none"
    return parse_settings(SCRIPTS[SHAPES[name].script].MODEL, "", [*needed, *flags])


def plan(name: str, resolution: int, **flags: Any) -> Plan:
    sizes = dict.fromkeys(("resolution", "validation_height", "validation_width"), resolution)
    return planner(name).plan(**sizes, **flags)


def preset_planner(name: str, preset: str, resolution: int = 1024) -> Planner:
    """With the flags that a preset changes. It shares simulations with `planner`."""
    before, after = default_settings(name).flat(), default_settings(name, "--preset", preset).flat()
    changed = {flag: value for flag, value in after.items() if value != before[flag]}
    changed |= dict.fromkeys(("resolution", "validation_height", "validation_width"), resolution)
    return planner(name).with_settings(**changed)


def peak(plan: Plan, phases: str = "") -> int:
    """Bytes at the peak of the phases whose names begin so, by default those after encoding."""
    is_encoding = phases.startswith("encoding")
    return max(phase.peak for phase in plan.phases if phase.name.startswith("encoding") == is_encoding)


def smallest_card(num_bytes: int) -> str:
    fitting = [size for size in MEMORY_SIZES if Card("", size, None).usable_bytes >= num_bytes]
    return f"{fitting[0]} GB" if fitting else "none"


def cell(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.1f}: {smallest_card(num_bytes)}"


def table(head: list[str], rows: Iterator[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def training_rows(
    names: tuple[str, ...] = tuple(SHAPES), resolutions: tuple[int, ...] = RESOLUTIONS
) -> Iterator[list]:
    for name in names:
        for resolution in resolutions:
            plans = [plan(name, resolution, gradient_checkpointing=True, **flags) for flags in WEIGHTS.values()]
            tera = f"{plans[0].mean_flops / 1e12:.0f}"
            yield [f"{NAMES[name]}, {resolution}", *(cell(peak(one)) for one in plans), tera]


def encoding_rows() -> Iterator[list[str]]:
    for name in SHAPES:
        flags = {"gradient_checkpointing": True}
        plans = [plan(name, 1024, quantize_text_encoder=kind, **flags) for kind in (None, "int8", "nf4")]
        yield [NAMES[name], *(cell(peak(one, "encoding")) for one in plans)]


def whole_plan(name: str, num_gpus: int = 1, **flags: Any) -> Plan:
    """Of the whole model."""
    full = {"train_mode": "full", "gradient_checkpointing": True, "fsdp": num_gpus > 1}
    return planner(name).on(num_processes=num_gpus).plan(**full, **flags)


def whole_rows(names: Sequence[str] = tuple(SHAPES)) -> Iterator[list[str]]:
    for name in names:
        for update, flags in UPDATES.items():
            on_gpu, in_host = (whole_plan(name, ema_device=device, **flags) for device in ("cuda", "cpu"))
            shared = [whole_plan(name, num_gpus, ema_device="cuda", **flags) for num_gpus in (4, 8)]
            yield [
                NAMES[name],
                f"`{update}`" if update else "master weights",
                *(cell(peak(one)) for one in (on_gpu, in_host)),
                f"{in_host.in_host / 1e9:.0f} GB; {in_host.moved / 1e9:.0f} GB",
                *(cell(peak(one)) for one in shared),
            ]


def whole_verdict(memory_gb: int = 80) -> str:
    """Which flags make each whole model fit on one GPU, those first that change least."""
    card = Card("", memory_gb, None)
    lines = []
    for name in SHAPES:
        full = planner(name).on(card).with_settings(train_mode="full", gradient_checkpointing=True)
        plans = {update: full.plan(**flags) for update, flags in UPDATES.items()}
        fitting = [(update, peak(one)) for update, one in plans.items() if peak(one) <= card.usable_bytes]
        if not fitting:
            lines.append(f"- {NAMES[name]} does not fit.")
            continue
        update, num_bytes = fitting[0]
        flags = f"`--gradient_checkpointing{' ' * bool(update)}{update}`"
        lines.append(f"- {NAMES[name]} fits with {flags}: {num_bytes / 1e9:.1f} GB of {card.usable_bytes / 1e9:.1f}.")
    return "\n".join([f"Whole on one card of {memory_gb} GB, in bf16:", "", *lines])


def whole_advice_rows(sizes: Sequence[int] = (24, 48, 80)) -> Iterator[list[str]]:
    """For each size of card, and each model that is too large for it."""
    for size in sizes:
        card = Card("", size, None)
        for name in SHAPES:
            full = planner(name).on(card).with_settings(train_mode="full", gradient_checkpointing=True)
            found = suggestions(full, full.plan(), card)
            if found:
                yield [f"{size} GB", NAMES[name], advice_cell(found, "drawing" if "drawing" in found else "training")]


def preset_rows() -> Iterator[list[str]]:
    for preset in preset_names():
        usable = Card("", int(preset.removesuffix("gb")), None).usable_bytes
        cells = []
        for name in SHAPES:
            one = preset_planner(name, preset).plan()
            num_bytes = max(peak(one), peak(one, "encoding"))
            cells.append(f"{num_bytes / 1e9:.1f}" + ("" if num_bytes <= usable else ", too large"))
        yield [f"`{preset}`", f"{usable / 1e9:.1f}", *cells]


def advice_rows(presets: Sequence[str] = ()) -> Iterator[list[str]]:
    """For each of the presets, by default all, and each model that is too large with it."""
    for preset in presets or preset_names():
        card = Card("", int(preset.removesuffix("gb")), None)
        for name in SHAPES:
            planner = preset_planner(name, preset)
            found = suggestions(planner, planner.plan(), card)
            if found:
                after = "drawing" if "drawing" in found else "training"
                cells = [advice_cell(found, "encoding"), advice_cell(found, after)]
                yield [f"`{preset}`", NAMES[name], *cells]


def advice_cell(found: dict[str, list[Suggestion]], part: str) -> str:
    if part not in found:
        return "fits"
    otherwise = "`--encode_only` on another machine" if part == "encoding" else "nothing"
    return "<br>".join(f"`{one.flags}`" for one in found[part]) or otherwise


def page() -> str:
    """The whole page. Takes minutes."""
    weights = [*WEIGHTS]
    return PAGE_TEXT.format(
        training=table(["", *weights, "TFLOP per step"], training_rows()),
        encoding=table(["", "bf16", "int8", "NF4"], encoding_rows()),
        whole=table(WHOLE_HEAD, whole_rows()),
        verdict=whole_verdict(),
        whole_advice=table(["card", "", "for training"], whole_advice_rows()),
        advice=table(["", "", "for encoding", "for training"], advice_rows()),
        presets=table(["", "for the run", *NAMES.values()], preset_rows()),
        reserve=f"{RESERVED_BYTES / 1e9:.1f} GB",
        share=f"{RESERVED_SHARE:.0%}",
        cards=", ".join(map(str, MEMORY_SIZES)),
    )


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
