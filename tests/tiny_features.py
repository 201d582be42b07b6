"""Tiny random feature models of the real classes: CLIP, DINO, CLIPSeg."""

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
    ViTImageProcessorPil,
)

from benchmarks.miniature.parts import byte_tokenizer


WIDTHS = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION = WIDTHS | {"image_size": 32, "patch_size": 8}
CROP = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}


def text_config() -> dict:
    tokenizer = byte_tokenizer()
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    return WIDTHS | {"vocab_size": len(tokenizer), "max_position_embeddings": 77} | ids


def make_tiny_clip(folder: Path) -> Path:
    torch.manual_seed(0)
    parts = CLIPModel(CLIPConfig(text_config=text_config(), vision_config={**VISION}, projection_dim=16))
    return save(folder, parts, CLIPImageProcessorPil(**CROP), byte_tokenizer())


def make_tiny_dino(folder: Path) -> Path:
    torch.manual_seed(0)
    return save(folder, Dinov2Model(Dinov2Config(**VISION)), BitImageProcessorPil(**CROP))


def make_tiny_clipseg(folder: Path) -> Path:
    torch.manual_seed(0)
    config = CLIPSegConfig(
        text_config=text_config(),
        vision_config=VISION | {"num_hidden_layers": 3},
        projection_dim=32,
        reduce_dim=16,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=32,
        extract_layers=[0, 1, 2],
    )
    processor = ViTImageProcessorPil(size={"height": 32, "width": 32})
    return save(folder, CLIPSegForImageSegmentation(config), processor, byte_tokenizer())


def save(folder: Path, *parts) -> Path:
    for part in parts:
        part.save_pretrained(folder)
    return folder
