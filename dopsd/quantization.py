"""The frozen base in fewer bits: NF4 by bitsandbytes, int8 and float8 by torchao."""

import json
import re
from pathlib import Path
from typing import Any

import diffusers
import torch
import torch.nn.functional as F
import transformers
from diffusers.hooks.layerwise_casting import DEFAULT_SKIP_MODULES_PATTERN
from torch import nn

from .errors import InputError
from .files import read_regular_file
from .loading import LOAD_ERRORS, brief
from .settings import ModelSettings
from .sharding import repeated_blocks


# Parts of the names of layers that compute scales and shifts from the timestep. They are small, and their errors reach
# every token. The others are diffusers' own patterns.
SENSITIVE = ("modulation", "embed")


def check_quantization(settings: ModelSettings) -> None:
    """Raises `InputError` if weights cannot be quantized as the settings say, or not on this machine."""
    read_quantization_settings(settings)
    for flag, kind in (
        ("--quantize", settings.quantize),
        ("--quantize_text_encoder", settings.quantize_text_encoder),
    ):
        if kind == "nf4" and not torch.cuda.is_available():
            raise InputError(f"{flag} nf4: needs a GPU that bitsandbytes supports; pass int8, or drop the flag")
        if kind == "float8" and torch.backends.mps.is_available():
            raise InputError(f"{flag} float8: Apple's GPUs have no 8-bit floating-point numbers; pass int8")


def read_quantization_settings(settings: ModelSettings) -> dict | None:
    """Arguments for `BitsAndBytesConfig` from `--bnb_quantization_config_path`; None without the flag."""
    path = settings.bnb_quantization_config_path
    if path is None:
        return None
    arguments = read_bnb_arguments(path)
    if not torch.cuda.is_available():
        raise InputError(f"--bnb_quantization_config_path {path}: quantized weights need a GPU; drop the flag")
    return arguments


def read_bnb_arguments(path: str) -> dict:
    """The content of `--bnb_quantization_config_path`. Raises `InputError` if it cannot be used on any machine."""
    try:
        arguments = json.loads(read_regular_file(Path(path)))
        kinds = [kind for kind in ("load_in_4bit", "load_in_8bit") if arguments.get(kind)]
        if len(kinds) != 1:
            raise ValueError("it sets neither or both of load_in_4bit and load_in_8bit")
        diffusers.BitsAndBytesConfig(**arguments)
    except LOAD_ERRORS as error:
        raise InputError(
            f"--bnb_quantization_config_path {path}: cannot be used ({brief(error)}); give a JSON file with the "
            'arguments of BitsAndBytesConfig, such as {"load_in_4bit": true, "bnb_4bit_quant_type": "nf4"}'
        ) from error
    return arguments


def transformer_quantization(settings: ModelSettings, skeleton: nn.Module, dtype: torch.dtype) -> Any:
    """diffusers' configuration for `--quantize` or `--bnb_quantization_config_path`; None without them.

    Args:
        skeleton: the transformer on the meta device.
        dtype: in which quantized layers compute.
    """
    if settings.quantize is None:
        arguments = read_quantization_settings(settings)
        if arguments is None:
            return None
        if arguments.get("load_in_4bit"):
            arguments["bnb_4bit_compute_dtype"] = dtype
        return diffusers.BitsAndBytesConfig(**arguments)
    return _config(diffusers, settings.quantize, dtype, unquantized_modules(skeleton))


def text_encoder_quantization(settings: ModelSettings, dtype: torch.dtype) -> Any:
    """transformers' configuration for `--quantize_text_encoder`; None without it.

    transformers itself leaves the embeddings and the language model's head as they are.
    """
    kind = settings.quantize_text_encoder
    return None if kind is None else _config(transformers, kind, dtype)


def _config(library: Any, kind: str, dtype: torch.dtype, unquantized: list[str] | None = None) -> Any:
    """A configuration of diffusers or transformers, whose classes have the same names and arguments."""
    if kind == "nf4":
        return library.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=unquantized,  # used for 4 bits as well
        )
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig

    quant_type = {"int8": Int8WeightOnlyConfig, "float8": Float8WeightOnlyConfig}[kind]
    # torchao would change settings of torch.compile for the whole process.
    return library.TorchAoConfig(quant_type(set_inductor_config=False), modules_to_not_convert=unquantized)


def unquantized_modules(skeleton: nn.Module) -> list[str]:
    """Full names of the linear layers that keep their precision.

    Quantized are those in the repeated blocks, which hold nearly all weights, but for layers that normalise, embed or
    modulate. What comes before and after the blocks, such as the output projection, is small and sensitive.

    Args:
        skeleton: a diffusers model, whose class names its repeated blocks and layers that are sensitive to precision.
    """
    patterns = (*DEFAULT_SKIP_MODULES_PATTERN, *(skeleton._skip_layerwise_casting_patterns or ()), *SENSITIVE)
    in_blocks = {module for block in repeated_blocks(skeleton) for module in block.modules()}
    return [
        name
        for name, module in skeleton.named_modules()
        if isinstance(module, nn.Linear)
        and (module not in in_blocks or any(re.search(pattern, name) for pattern in patterns))
    ]


class _FrozenLinear(torch.autograd.Function):
    """x W^T + b for a quantized W that needs no gradient. Only the quantized W is kept for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(weight)
        return F.linear(x, weight.dequantize(), bias)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return gradient @ weight.dequantize(), None, None


class QuantizedLinear(nn.Linear):
    """Linear layer with a frozen weight that torchao quantized. (*, in_features) -> (*, out_features).

    torchao's own would keep the dequantized weight for the backward pass, so that the weights of all layers were in
    memory in full precision as well. This one dequantizes it again. It computes what a layer with the dequantized
    weight computes.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _FrozenLinear.apply(x, self.weight, self.bias)


def forget_dequantized_weights(transformer: nn.Module) -> None:
    """Makes the layers that torchao quantized `QuantizedLinear`s, in place."""
    from torchao.utils import TorchAOBaseTensor

    for module in transformer.modules():
        if isinstance(module, nn.Linear) and isinstance(module.weight, TorchAOBaseTensor):
            module.__class__ = QuantizedLinear
