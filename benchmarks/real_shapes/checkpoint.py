"""Checkpoints of the published shapes with random weights, and what a run on them reads."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from safetensors.torch import save_file
from transformers import Qwen3Config, Qwen3VLConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel

from benchmarks.miniature.files import replacing
from benchmarks.miniature.parts import byte_tokenizer
from benchmarks.startup import write_data
from benchmarks.step_models import TINY_KLEIN, TINY_TEXT, make_random
from benchmarks.vlm_files import PREPROCESSOR, vlm_config
from dopsd.model import Model
from pipelines.published_shapes import SHAPES, PublishedShape
from pipelines.vision_encoder import PREPROCESSOR_FILE, WEIGHTS_FILE


DTYPE = torch.bfloat16
NUM_PHOTOGRAPHS = 4
CAPTION_COLUMN = "text0"
PIPELINE_OPTIONS = {"train_dopsd_flux2": {"is_distilled": True}}
# The prompt embeddings are layers 9, 18 and 27 of the text encoder.
TINY = replace(
    TINY_KLEIN,
    text_encoder=TINY_TEXT | {"vocab_size": 512, "num_hidden_layers": 28},
    vision_tower={
        "depth": 4,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_heads": 2,
        "out_hidden_size": TINY_TEXT["hidden_size"],
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0, 2, 3],
    },
)


@dataclass(frozen=True)
class Subject:
    """A model's shape, and the side of its pictures in pixels."""

    shape: PublishedShape
    side: int = 1024


SUBJECTS = {name: Subject(shape) for name, shape in SHAPES.items()} | {"tiny": Subject(TINY, 64)}


@dataclass(frozen=True)
class Files:
    """What the runs on one model share, in a folder: the checkpoints, the pictures and the cache of encodings."""

    folder: Path

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint"

    @property
    def vlm(self) -> Path:
        return self.folder / "vlm"

    @property
    def photographs(self) -> Path:
        return self.folder / "photographs"

    @property
    def cache(self) -> Path:
        return self.folder / "context_cache"

    def make(self, subject: Subject, model: Model, device: torch.device) -> None:
        """Writes what is missing. Weights are made on the device."""
        self.folder.mkdir(parents=True, exist_ok=True)
        text_config = model.text_encoder_class.config_class(**subject.shape.text_encoder)
        if not self.photographs.exists():
            with replacing(self.photographs) as unfinished:
                write_data(unfinished, NUM_PHOTOGRAPHS, NUM_PHOTOGRAPHS, side=subject.side)
        if not self.vlm.exists():
            with replacing(self.vlm) as unfinished:
                write_vlm(unfinished, vlm_config(text_config, subject.shape.vision_tower), device)
        if not self.checkpoint.exists():
            with replacing(self.checkpoint) as unfinished:
                write_checkpoint(unfinished, subject.shape, model, text_config, device)


def write_checkpoint(
    folder: Path, shape: PublishedShape, model: Model, text_config: Qwen3Config, device: torch.device
) -> None:
    """Writes the stock pipeline with random weights, in shards of at most 5 GB."""
    pipeline = model.stock_pipeline_class(
        scheduler=FlowMatchEulerDiscreteScheduler(**shape.scheduler),
        vae=make_random(model.vae_class, shape.vae, DTYPE, device),
        text_encoder=make_random(model.text_encoder_class, {"config": text_config}, DTYPE, device),
        tokenizer=byte_tokenizer(),
        transformer=make_random(model.transformer_class, shape.transformer, DTYPE, device),
        **PIPELINE_OPTIONS.get(shape.script, {}),
    )
    pipeline.save_pretrained(folder, max_shard_size="5GB")


def write_vlm(folder: Path, config: Qwen3VLConfig, device: torch.device) -> None:
    """Writes a Qwen3-VL checkpoint of which only the vision tower has weights: training reads no others."""
    tower = make_random(Qwen3VLVisionModel, {"config": config.vision_config}, DTYPE, device)
    config.save_pretrained(folder)
    weights = {f"model.visual.{name}": weight.cpu() for name, weight in tower.state_dict().items()}
    save_file(weights, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    (folder / PREPROCESSOR_FILE).write_text(json.dumps(PREPROCESSOR, indent=2))
