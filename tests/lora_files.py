"""LoRAs of the tiny checkpoints as several programs save them."""

import json

import torch
from peft import LoraConfig


RANK = 4


def pair(out_features, in_features, seed, rank=RANK):
    """lora_A and lora_B of one module."""
    generator = torch.Generator().manual_seed(seed)
    return (
        0.3 * torch.randn(rank, in_features, generator=generator),
        0.3 * torch.randn(out_features, rank, generator=generator),
    )


def a_and_b(shapes, prefix):
    """{module: (out, in)} -> tensors named as PEFT names them."""
    weights = {}
    for seed, (module, (out_features, in_features)) in enumerate(shapes.items()):
        a, b = pair(out_features, in_features, seed)
        weights |= {f"{prefix}{module}.lora_A.weight": a, f"{prefix}{module}.lora_B.weight": b}
    return weights


def down_and_up(shapes, prefix, alpha):
    """{module: (out, in)} -> tensors named as kohya's scripts name them."""
    weights = {}
    for seed, (module, (out_features, in_features)) in enumerate(shapes.items()):
        a, b = pair(out_features, in_features, seed)
        name = prefix + module.replace(".", "_")
        weights |= {
            f"{name}.lora_down.weight": a,
            f"{name}.lora_up.weight": b,
            f"{name}.alpha": torch.tensor(float(alpha)),
        }
    return weights


# Some modules of each kind of block, with (out, in): by diffusers' names, and by those of the published checkpoint.
KLEIN = {
    "transformer_blocks.1.attn.to_q": (32, 32),
    "transformer_blocks.0.ff.linear_in": (192, 32),
    "transformer_blocks.0.attn.add_k_proj": (32, 32),
    "single_transformer_blocks.1.attn.to_qkv_mlp_proj": (288, 32),
}
KLEIN_FUSED = {
    "double_blocks.0.img_attn.qkv": (96, 32),
    "double_blocks.1.txt_attn.qkv": (96, 32),
    "double_blocks.1.img_attn.proj": (32, 32),
    "double_blocks.0.txt_mlp.0": (192, 32),
    "single_blocks.0.linear1": (288, 32),
    "single_blocks.1.linear2": (32, 128),
}
Z_IMAGE = {
    "layers.1.attention.to_q": (32, 32),
    "layers.0.feed_forward.w1": (85, 32),
    "noise_refiner.0.attention.to_out.0": (32, 32),
    "context_refiner.0.attention.to_v": (32, 32),
}


def adapter_metadata(shapes, prefix, alpha=2 * RANK):
    """What diffusers writes into a LoRA's file."""
    config = LoraConfig(r=RANK, lora_alpha=alpha, target_modules=list(shapes)).to_dict()
    config["target_modules"] = sorted(config["target_modules"])
    return {"lora_adapter_metadata": json.dumps({prefix + name: value for name, value in config.items()})}


FILES = {
    "flux2": {
        "stock": lambda: a_and_b(KLEIN, "transformer."),
        "PEFT": lambda: a_and_b(KLEIN, "base_model.model."),
        "ai-toolkit": lambda: a_and_b(KLEIN, "diffusion_model."),
        "fused": lambda: a_and_b(KLEIN_FUSED, "diffusion_model."),
        "kohya": lambda: down_and_up(KLEIN_FUSED, "lora_unet_", alpha=1),
    },
    "zimage": {
        "stock": lambda: a_and_b(Z_IMAGE, "transformer."),
        "ai-toolkit": lambda: a_and_b(Z_IMAGE, "diffusion_model."),
        "kohya": lambda: down_and_up(Z_IMAGE, "lora_unet_", alpha=1),
    },
}
