"""A tiny Qwen3-VL of the real classes, with random weights, for the tiny text encoders."""

import json
from pathlib import Path

import torch
from transformers import Qwen3Config, Qwen3VLForConditionalGeneration

from benchmarks.miniature.parts import byte_tokenizer
from benchmarks.real_shapes.checkpoint import TINY
from benchmarks.vlm_files import PREPROCESSOR, vlm_config


def make_tiny_vlm(
    folder: str | Path,
    *,
    text_config: Qwen3Config | None = None,
    tie_word_embeddings: bool = True,
    seed: int = 1,
) -> Path:
    """Writes a tiny `Qwen3VLForConditionalGeneration`: shards with an index, and the files as on the Hub.

    Args:
        folder: where the checkpoint is written.
        text_config: of the text encoder that it fits; by default `make_tiny_klein`'s.
        seed: of the random weights.

    Returns:
        `folder`. A patch has 16 x 16 pixels, a token 2 x 2 patches.
    """
    tokenizer = byte_tokenizer()
    if text_config is None:
        text_config = Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=28,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
        )
    vision_tower = TINY.vision_tower | {"out_hidden_size": text_config.hidden_size}
    config = vlm_config(text_config, vision_tower, tie_word_embeddings=tie_word_embeddings, initializer_range=0.2)
    torch.manual_seed(seed)
    model = Qwen3VLForConditionalGeneration(config)
    # As in make_tiny_klein: the default gain would leave little of the picture.
    for module in model.model.visual.modules():
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv3d)):
            torch.nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
        if isinstance(module, torch.nn.Embedding):
            torch.nn.init.normal_(module.weight)
    folder = Path(folder)
    model.save_pretrained(folder, max_shard_size="200KB")

    # The Hub's form of the rotary settings, which transformers reads and no longer writes.
    saved = json.loads((folder / "config.json").read_text())
    rope = saved["text_config"].pop("rope_parameters")
    saved["text_config"] |= {"rope_theta": int(rope.pop("rope_theta")), "rope_scaling": rope}
    (folder / "config.json").write_text(json.dumps(saved, indent=2))
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR, indent=2))
    return folder
