"""Muon for matrices and convolutions, AdamW for what is left: one small optimizer for the miniature's parts."""

import torch


class MuonAdamW:
    """`torch.optim.Muon` on every weight of two or more dimensions, flattened to a matrix; AdamW on the others.

    Args:
        module: whose parameters are trained.
        muon_lr, adamw_lr: peak learning rates; `step` scales both.
    """

    def __init__(self, module: torch.nn.Module, *, muon_lr: float, adamw_lr: float):
        parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self.matrices = [parameter for parameter in parameters if parameter.ndim > 1]
        self.flat = [torch.nn.Parameter(parameter.data.flatten(1)) for parameter in self.matrices]  # shares memory
        vectors = [parameter for parameter in parameters if parameter.ndim == 1]
        self.parameters = parameters
        self.optimizers = [torch.optim.Muon(self.flat, lr=muon_lr, weight_decay=0.0)]
        if vectors:
            self.optimizers.append(torch.optim.AdamW(vectors, lr=adamw_lr, weight_decay=0.0))
        self.peaks = [muon_lr, adamw_lr]

    def step(self, scale: float) -> None:
        """One update at `scale` times the peak learning rates; clears the gradients."""
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for flat, parameter in zip(self.flat, self.matrices, strict=True):
            flat.grad = parameter.grad.flatten(1)
        for optimizer, peak in zip(self.optimizers, self.peaks, strict=False):
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
    """Learning rate over its peak: a linear warm-up, a plateau, a linear way down to 0 over the last share."""
    return min(1.0, (step + 1) / warmup, (num_steps - step) / (decay_share * num_steps))
