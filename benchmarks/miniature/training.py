"""What training the VAE and distilling the transformer share: optimizer, learning-rate schedule, precision, state."""

from pathlib import Path

import torch

from benchmarks.miniature.files import replacing


class MuonAdamW:
    """Muon for weights of two or more dimensions, AdamW for the others.

    Args:
        module: the module to train.
        muon_lr, adamw_lr: peak learning rates; `step` scales both.
    """

    def __init__(self, module: torch.nn.Module, *, muon_lr: float, adamw_lr: float):
        self.parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self.matrices = [parameter for parameter in self.parameters if parameter.ndim > 1]
        # `torch.optim.Muon` takes matrices only. The flattened parameters share memory with the module's.
        self.flat = [torch.nn.Parameter(parameter.data.flatten(1)) for parameter in self.matrices]
        self.optimizers = [torch.optim.Muon(self.flat, lr=muon_lr, weight_decay=0.0)]
        self.peaks = [muon_lr]
        if vectors := [parameter for parameter in self.parameters if parameter.ndim == 1]:
            self.optimizers.append(torch.optim.AdamW(vectors, lr=adamw_lr, weight_decay=0.0))
            self.peaks.append(adamw_lr)

    def step(self, scale: float) -> None:
        """Clips the gradients, makes one update at `scale` times the peak learning rates, clears the gradients."""
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for flat, parameter in zip(self.flat, self.matrices, strict=True):
            flat.grad = parameter.grad.flatten(1)
        for optimizer, peak in zip(self.optimizers, self.peaks, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = peak * scale
            optimizer.step()
        for parameter in self.parameters:
            parameter.grad = None

    def state_dict(self) -> dict:
        return {str(index): optimizer.state_dict() for index, optimizer in enumerate(self.optimizers)}

    def load_state_dict(self, state: dict) -> None:
        for index, optimizer in enumerate(self.optimizers):
            optimizer.load_state_dict(state[str(index)])


def trapezoid(step: int, num_steps: int, *, warmup: int, decay_share: float) -> float:
    """Learning rate relative to its peak: linear warm-up, plateau, and linear decay to 0.

    Args:
        step: counted from 0.
        warmup: steps until the peak is reached.
        decay_share: share of the steps over which the learning rate decays.
    """
    return min(1.0, (step + 1) / warmup, (num_steps - step) / (decay_share * num_steps))


def autocast() -> torch.autocast:
    """bfloat16 on CPUs that multiply it in hardware. On others torch emulates it, 20 times slower than float32."""
    capabilities = torch.cpu.get_capabilities()
    has_bfloat16 = capabilities.get("avx512_bf16", False) or capabilities.get("amx_bf16", False)
    return torch.autocast("cpu", torch.bfloat16, enabled=has_bfloat16)


def load_or_none(path: Path) -> dict | None:
    """A state that `save_state` wrote, or None if there is none."""
    return torch.load(path, map_location="cpu", weights_only=True) if path.exists() else None


def save_state(state: dict, path: Path) -> None:
    with replacing(path) as partial:
        torch.save(state, partial)
