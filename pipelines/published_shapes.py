"""Configurations of the published checkpoints' components: their sizes, without a download.

Each is what the component's config.json says where it differs from the default of its class.
"""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class PublishedShape:
    """Arguments of the classes of a checkpoint's components.

    Attributes:
        script: stem of the training script.
        transformer, text_encoder, vae, scheduler: arguments of the component's class or configuration class.
        vision_tower: arguments of `Qwen3VLVisionConfig`, of the vision-language model that fits the text encoder.
    """

    script: str
    transformer: dict[str, Any]
    text_encoder: dict[str, Any]
    vae: dict[str, Any]
    scheduler: dict[str, Any]
    vision_tower: dict[str, Any]


_QWEN3 = {
    "vocab_size": 151936,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000},
}
QWEN3_4B = _QWEN3 | {"hidden_size": 2560, "intermediate_size": 9728, "tie_word_embeddings": True}
QWEN3_8B = _QWEN3 | {"hidden_size": 4096, "intermediate_size": 12288, "tie_word_embeddings": False}

QWEN3_VL_4B_VISION = {
    "depth": 24,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_heads": 16,
    "out_hidden_size": 2560,
    "deepstack_visual_indexes": [5, 11, 17],
}
QWEN3_VL_8B_VISION = {
    "depth": 27,
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_heads": 16,
    "out_hidden_size": 4096,
    "deepstack_visual_indexes": [8, 16, 24],
}

KLEIN_SCHEDULER = {
    "use_dynamic_shifting": True,
    "shift": 3.0,
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
    "time_shift_type": "exponential",
}

KLEIN_4B = PublishedShape(
    script="train_dopsd_flux2",
    transformer={
        "num_layers": 5,
        "num_single_layers": 20,
        "num_attention_heads": 24,
        "joint_attention_dim": 7680,
        "in_channels": 128,
        "guidance_embeds": False,
    },
    text_encoder=QWEN3_4B,
    vae={},
    scheduler=KLEIN_SCHEDULER,
    vision_tower=QWEN3_VL_4B_VISION,
)
KLEIN_9B = PublishedShape(
    script="train_dopsd_flux2",
    transformer={
        "num_layers": 8,
        "num_single_layers": 24,
        "num_attention_heads": 32,
        "joint_attention_dim": 12288,
        "in_channels": 128,
        "guidance_embeds": False,
    },
    text_encoder=QWEN3_8B,
    vae={},
    scheduler=KLEIN_SCHEDULER,
    vision_tower=QWEN3_VL_8B_VISION,
)
Z_IMAGE_TURBO = PublishedShape(
    script="train_dopsd_zimage",
    transformer={
        "in_channels": 16,
        "dim": 3840,
        "n_layers": 30,
        "n_refiner_layers": 2,
        "n_heads": 30,
        "n_kv_heads": 30,
        "cap_feat_dim": 2560,
        "axes_dims": [32, 48, 48],
        "axes_lens": [1536, 512, 512],
    },
    text_encoder=QWEN3_4B,
    vae={
        "block_out_channels": (128, 256, 512, 512),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "layers_per_block": 2,
        "latent_channels": 16,
        "scaling_factor": 0.3611,
        "shift_factor": 0.1159,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    },
    scheduler={"shift": 3.0, "use_dynamic_shifting": False},
    vision_tower=QWEN3_VL_4B_VISION,
)

SHAPES = {"klein-4b": KLEIN_4B, "klein-9b": KLEIN_9B, "z-image": Z_IMAGE_TURBO}
