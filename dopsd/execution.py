"""How the transformer is executed: checkpointing and device. None of it changes what is computed."""

import torch

from .settings import PerformanceSettings


def prepare_transformer(transformer: torch.nn.Module, settings: PerformanceSettings, device: torch.device) -> None:
    """Puts the transformer, with its adapters, into the state in which it is trained.

    Args:
        device: the accelerator.
    """
    if settings.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    transformer.to(device)
