"""The weights of transformer and encoders: in how many bits they are kept, and where."""

from dataclasses import dataclass

import torch
from torch import nn

from ..quantization import read_bnb_arguments, unquantized_modules
from ..settings import Settings
from ..sharding import processes_per_machine, repeated_blocks
from .allocations import module_bytes, pinned_bytes


# Bytes of a quantized weight. bitsandbytes' NF4 with double quantization has one 8-bit scale for 64 weights, and one
# float32 number for 256 scales; the others have one scale for each output channel, added below.
BYTES_PER_WEIGHT = {"nf4": 0.5 + 1 / 64 + 4 / (64 * 256), "int8": 1.0, "float8": 1.0}


@dataclass(frozen=True)
class Placement:
    """How the weights are kept.

    Attributes:
        quantize, quantize_text_encoder: "nf4", "int8", "float8" or None.
        offload_transformer: the blocks' weights stay in host memory.
        num_shards: processes that share the blocks' weights: those of one machine, or all if these are trained.
        is_whole: whether what is said of the blocks is true of all weights, because these are trained.
    """

    quantize: str | None = None
    quantize_text_encoder: str | None = None
    offload_transformer: bool = False
    num_shards: int = 1
    is_whole: bool = False

    @property
    def is_shared(self) -> bool:
        """Whether a block's weights come together only while it computes."""
        return self.offload_transformer or self.num_shards > 1


def placement(settings: Settings, num_processes: int) -> Placement:
    """What the flags say. Of several machines, each is taken to have as many processes as this one."""
    model, performance = settings.model, settings.performance
    kind = model.quantize
    if model.bnb_quantization_config_path is not None:
        kind = "nf4" if read_bnb_arguments(model.bnb_quantization_config_path).get("load_in_4bit") else "int8"
    is_full = settings.full.is_full
    num_sharing = num_processes if is_full else processes_per_machine(num_processes)
    return Placement(
        quantize=kind,
        quantize_text_encoder=model.quantize_text_encoder,
        offload_transformer=performance.offload_transformer,
        num_shards=num_sharing if performance.is_sharded else 1,
        is_whole=is_full,
    )


@dataclass(frozen=True)
class FrozenBytes:
    """Of a module's weights.

    Attributes:
        device: bytes on the accelerator.
        host: bytes in host memory.
        read: bytes in host memory while the weights are read from the checkpoint.
        moved: bytes that come from host memory for each pass through the module.
        dequantized: bytes of the largest layer that is dequantized for its matrix product.
    """

    device: int
    host: int = 0
    read: int = 0
    moved: int = 0
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

    A block that is offloaded or shared comes to the accelerator when it computes. Several processes fetch the next
    block meanwhile, one process does not: torch's `FSDPParamGroup.unshard` then copies in the stream that computes.
    The transformer is read into each process as a whole before.
    """
    whole = frozen_bytes(transformer, placement.quantize)
    if not placement.is_shared:
        return whole
    num_shards, weights = placement.num_shards, module_bytes(transformer)
    blocks = [[tensor.nbytes for tensor in block.parameters()] for block in repeated_blocks(transformer)]
    sizes = sorted(map(sum, blocks))
    outside, held = weights - sum(sizes), (weights if placement.is_whole else sum(sizes)) // num_shards
    on_device = outside + sum(sizes[-1:] if num_shards == 1 else sizes[-2:])
    if not placement.offload_transformer:
        return FrozenBytes(on_device + held, read=weights)
    parts = [tensor.nbytes for tensor in transformer.parameters()] if placement.is_whole else sum(blocks, [])
    pinned = sum(pinned_bytes(-(-size // num_shards)) for size in parts)
    return FrozenBytes(on_device, host=pinned, read=weights, moved=held)


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
