"""How the transformer is executed: checkpointing, attention, compiling, and where its weights are.

None of it changes what is computed, but for its rounding.
"""

from collections.abc import Callable, Collection
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from torch.utils.checkpoint import checkpoint

from .compilation import CompiledBlocks
from .settings import PerformanceSettings, Settings
from .sharding import shard


logger = get_logger(__name__)


def loading_device(settings: Settings, accelerator: Accelerator) -> torch.device | None:
    """Where the transformer is loaded to: the accelerator, or None for the CPU if it will be sharded."""
    return None if settings.performance.is_sharded else accelerator.device


def prepare_transformer(
    transformer: torch.nn.Module,
    adapters: Collection[torch.nn.Parameter] | None,
    settings: PerformanceSettings,
    accelerator: Accelerator,
) -> CompiledBlocks | None:
    """Puts the transformer, with its adapters, into the state in which it is trained.

    Args:
        adapters: all of its parameters that are not the pretrained model's; None if it is trained itself.

    Returns:
        With `--compile`, its blocks.
    """
    if settings.gradient_checkpointing:
        transformer.enable_gradient_checkpointing(checkpoint_to_host if settings.offload_activations else None)
    if settings.attention_backend is not None:
        transformer.set_attention_backend(settings.attention_backend)
    if settings.is_sharded:
        shard(transformer, adapters, settings, accelerator)
    else:
        transformer.to(accelerator.device)
    if not settings.compile:
        return None
    logger.info("--compile: blocks are compiled when they are first used, which takes minutes in all")
    return CompiledBlocks(transformer)


def checkpoint_to_host(function: Callable[..., Any], *inputs: Any) -> Any:
    """`torch.utils.checkpoint`, which keeps the inputs in host memory until the backward pass needs them."""
    with torch.autograd.graph.save_on_cpu(pin_memory=torch.cuda.is_available()):
        return checkpoint(function, *inputs, use_reentrant=False)
