"""A tiny Qwen3-VL of the real classes, with random weights, for the tiny text encoders."""

import json
from pathlib import Path

import torch
from transformers import Qwen3Config, Qwen3VLConfig, Qwen3VLForConditionalGeneration

from pipelines.vision_encoder import LANGUAGE_FIELDS
from tiny_klein import byte_tokenizer


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
    # Of each head's 64 frequencies, Qwen3-VL uses 24 for time and 20 each for height and width.
    frequencies = text_config.head_dim // 2
    spatial = frequencies * 20 // 64
    rope = {
        "rope_type": "default",
        "mrope_interleaved": True,
        "mrope_section": [frequencies - 2 * spatial, spatial, spatial],
    }
    config = Qwen3VLConfig(
        text_config={
            **{field: getattr(text_config, field) for field in LANGUAGE_FIELDS},
            "initializer_range": 0.2,
            "rope_parameters": {**rope, "rope_theta": 5e6},
        },
        vision_config={
            "depth": 4,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_heads": 2,
            "out_hidden_size": text_config.hidden_size,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 2, 3],
        },
        tie_word_embeddings=tie_word_embeddings,
    )
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
    del saved["text_config"]["rope_parameters"]
    saved["text_config"] |= {"rope_theta": 5000000, "rope_scaling": rope}
    (folder / "config.json").write_text(json.dumps(saved, indent=2))
    preprocessor = {
        "size": {"longest_edge": 16777216, "shortest_edge": 65536},
        "patch_size": 16,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "processor_class": "Qwen3VLProcessor",
        "image_processor_type": "Qwen2VLImageProcessorFast",
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor, indent=2))
    return folder
