"""Frozen weights: in how many bits they are kept, and where."""

import json
from dataclasses import dataclass

import torch
from torch import nn

from ..quantization import unquantized_modules
from ..settings import Settings
from ..sharding import repeated_blocks
from .allocations import module_bytes


# Bytes of a quantized weight. bitsandbytes' NF4 with double quantization has one 8-bit scale for 64 weights, and one
# float32 number for 256 scales; the others have one scale for each output channel, added below.
BYTES_PER_WEIGHT = {"nf4": 0.5 + 1 / 64 + 4 / (64 * 256), "int8": 1.0, "float8": 1.0}


@dataclass(frozen=True)
class Placement:
    """How the frozen weights are kept.

    Attributes:
        quantize, quantize_text_encoder: "nf4", "int8", "float8" or None.
        offload_transformer: the blocks' weights stay in host memory.
        num_shards: processes that share the blocks' weights.
    """

    quantize: str | None = None
    quantize_text_encoder: str | None = None
    offload_transformer: bool = False
    num_shards: int = 1


def placement(settings: Settings, num_processes: int) -> Placement:
    """What the flags say."""
    model, performance = settings.model, settings.performance
    kind = model.quantize
    if model.bnb_quantization_config_path is not None:
        with open(model.bnb_quantization_config_path, encoding="utf-8") as file:
            kind = "nf4" if json.load(file).get("load_in_4bit") else "int8"
    return Placement(
        quantize=kind,
        quantize_text_encoder=model.quantize_text_encoder,
        offload_transformer=performance.offload_transformer,
        num_shards=num_processes if performance.fsdp else 1,
    )


@dataclass(frozen=True)
class FrozenBytes:
    """Of a module's frozen weights.

    Attributes:
        device: bytes on the accelerator.
        host: bytes in host memory.
        dequantized: bytes of the largest layer that is dequantized for its matrix product.
    """

    device: int
    host: int = 0
    dequantized: int = 0


def frozen_bytes(module: nn.Module, kind: str | None) -> FrozenBytes:
    """All weights of a module on the accelerator.

    Args:
        module: on the meta device, without adapters.
        kind: of the quantization.
    """
    layers = quantized_layers(module) if kind else []
    saved = sum(layer.weight.nbytes - quantized_bytes(layer, kind) for layer in layers)
    largest = max((layer.weight.nbytes for layer in layers), default=0)
    return FrozenBytes(module_bytes(module) - saved, dequantized=largest)


def transformer_bytes(transformer: nn.Module, placement: Placement) -> FrozenBytes:
    """The transformer's weights where the flags put them.

    Blocks that are offloaded or shared are on the accelerator two at a time: one computes while the next one comes.
    """
    whole = frozen_bytes(transformer, placement.quantize)
    if not placement.offload_transformer and placement.num_shards == 1:
        return whole
    blocks = sorted(module_bytes(block) for block in repeated_blocks(transformer))
    outside, held = module_bytes(transformer) - sum(blocks), sum(blocks) // placement.num_shards
    on_device = outside + sum(blocks[-2:])
    if placement.offload_transformer:
        return FrozenBytes(on_device, host=held)
    return FrozenBytes(on_device + held)


def quantized_layers(module: nn.Module) -> list[nn.Linear]:
    """The linear layers that are quantized: of a text encoder, all but a language model's head."""
    if hasattr(module, "_repeated_blocks"):
        left_out = {*unquantized_modules(module)}
    else:
        left_out = {name for name, _ in module.named_modules() if name.endswith("lm_head")}
    return [layer for name, layer in module.named_modules() if isinstance(layer, nn.Linear) and name not in left_out]


def quantized_bytes(layer: nn.Linear, kind: str) -> int:
    scales = 0 if kind == "nf4" else layer.out_features * torch.float32.itemsize
    return round(layer.weight.numel() * BYTES_PER_WEIGHT[kind]) + scales
