"""The modules that are trained by default are those that ComfyUI and Forge have names for, on real shapes."""

import re

import pytest
import torch
from diffusers import Flux2Transformer2DModel, ZImageTransformer2DModel

import train_dopsd_flux2
import train_dopsd_zimage
from dopsd.lora_roles import lora_target_modules


KLEIN_DOUBLE = """
attn.to_q attn.to_k attn.to_v attn.to_out.0 attn.add_q_proj attn.add_k_proj attn.add_v_proj attn.to_add_out
ff.linear_in ff.linear_out ff_context.linear_in ff_context.linear_out
""".split()
KLEIN_SINGLE = ["attn.to_qkv_mlp_proj", "attn.to_out"]
Z_IMAGE_BLOCK = """
attention.to_q attention.to_k attention.to_v attention.to_out.0 feed_forward.w1 feed_forward.w2 feed_forward.w3
""".split()

# (script, transformer class, its published configuration where it differs from the class's defaults, blocks)
MODELS = {
    "klein-4B": (
        train_dopsd_flux2,
        Flux2Transformer2DModel,
        {"num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24, "joint_attention_dim": 7680},
        {"transformer_blocks": (5, KLEIN_DOUBLE), "single_transformer_blocks": (20, KLEIN_SINGLE)},
    ),
    "klein-9B": (
        train_dopsd_flux2,
        Flux2Transformer2DModel,
        {"num_layers": 8, "num_single_layers": 24, "num_attention_heads": 32, "joint_attention_dim": 12288},
        {"transformer_blocks": (8, KLEIN_DOUBLE), "single_transformer_blocks": (24, KLEIN_SINGLE)},
    ),
    "Z-Image-Turbo": (
        train_dopsd_zimage,
        ZImageTransformer2DModel,
        {},
        {
            "layers": (30, Z_IMAGE_BLOCK),
            "noise_refiner": (2, Z_IMAGE_BLOCK),
            "context_refiner": (2, Z_IMAGE_BLOCK),
        },
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_default_layers_are_those_that_other_software_has_names_for(name):
    script, transformer_class, config, blocks = MODELS[name]
    with torch.device("meta"):
        transformer = transformer_class(**config)
    expected = {
        f"{kind}.{index}.{layer}"
        for kind, (count, layers) in blocks.items()
        for index in range(count)
        for layer in layers
    }
    model = script.MODEL
    assert set(lora_target_modules(transformer, model.default_settings["lora_layers"])) == expected
    assert all(re.fullmatch(model.portable_lora_layers, module) for module in expected)
    others = {module for module, kind in transformer.named_modules() if isinstance(kind, torch.nn.Linear)} - expected
    assert others and not any(re.fullmatch(model.portable_lora_layers, module) for module in others)
