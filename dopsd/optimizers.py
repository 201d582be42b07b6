"""Optimizer and learning rate schedule."""

import torch
from accelerate.logging import get_logger
from diffusers.optimization import get_scheduler

from .settings import OptimizerSettings
from .weight_copies import local


logger = get_logger(__name__)


def build_optimizer(
    settings: OptimizerSettings,
    parameters: list[torch.nn.Parameter],
    pictures_per_step: float,
    *,
    is_full: bool = False,
) -> torch.optim.Optimizer:
    """The optimizer that the settings name.

    Args:
        pictures_per_step: mean over an epoch, over all processes; what `--scale_lr` multiplies by.
        is_full: whether these are the transformer's own weights. They may be bfloat16, whose steps are then rounded at
            random, and sharded, which bitsandbytes does not know.
    """
    options = {
        "lr": settings.learning_rate * (pictures_per_step if settings.scale_lr else 1),
        "betas": (settings.adam_beta1, settings.adam_beta2),
        "weight_decay": settings.adam_weight_decay,
        "eps": settings.adam_epsilon,
    }
    if settings.optimizer == "prodigy":
        import prodigyopt

        if settings.learning_rate <= 0.1:
            logger.warning(f"--learning_rate {settings.learning_rate}: Prodigy multiplies its own rate by it; use 1.0")
        return prodigyopt.Prodigy(
            parameters,
            beta3=settings.prodigy_beta3,
            decouple=settings.prodigy_decouple,
            use_bias_correction=settings.prodigy_use_bias_correction,
            safeguard_warmup=settings.prodigy_safeguard_warmup,
            **options,
        )
    rounds = any(parameter.dtype == torch.bfloat16 for parameter in parameters)
    if is_full and (settings.use_8bit_adam or rounds):
        return torchao_optimizer(settings.use_8bit_adam, parameters[0].device)(
            parameters, **options, bf16_stochastic_round=rounds
        )
    if settings.use_8bit_adam:
        import bitsandbytes

        return bitsandbytes.optim.AdamW8bit(parameters, **options)
    # For whole models, what torch's default on a GPU takes beside the states matters: the roots of all second moments.
    fused = True if is_full and parameters[0].device.type == "cuda" else None
    return torch.optim.AdamW(parameters, fused=fused, **options)


def torchao_optimizer(in_8_bits: bool, device: torch.device) -> type[torch.optim.Optimizer]:
    """torchao's AdamW, which can round steps at random. On a CPU it does not compile its steps."""
    from torchao.optim import AdamW8bit, _AdamW

    kind = AdamW8bit if in_8_bits else _AdamW

    def new_buffer(self, p: torch.Tensor, signed: bool) -> torch.Tensor:
        """In bfloat16, as torchao keeps what it does not quantize, the average of squared gradients stalls."""
        buffer = kind._new_buffer(self, p, signed)
        return buffer.float() if buffer.dtype == torch.bfloat16 and not is_quantized(buffer) else buffer

    changed = {"_new_buffer": new_buffer}
    if device.type == "cpu":
        changed["step"] = torch.compiler.set_stance("force_eager")(kind.step)
    return type(kind.__name__, (kind,), changed)


def is_quantized(buffer: torch.Tensor) -> bool:
    """Whether a state of torchao's, sharded or not, is in 8 bits; it then only looks like its weight's dtype."""
    return hasattr(local(buffer), "codes")


def build_lr_scheduler(
    settings: OptimizerSettings, optimizer: torch.optim.Optimizer, num_steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """The learning rate schedule over `num_steps` optimizer steps."""
    return get_scheduler(
        settings.lr_scheduler,
        optimizer,
        num_warmup_steps=settings.lr_warmup_steps,
        num_training_steps=num_steps,
        num_cycles=settings.lr_num_cycles,
        power=settings.lr_power,
    )


def effective_learning_rate(optimizer: torch.optim.Optimizer) -> float:
    """The rate of the current step. Prodigy multiplies the schedule's by the step size that it has estimated."""
    group = optimizer.param_groups[0]
    return float(group["lr"]) * group.get("d", 1.0)  # torchao keeps the rate in a tensor
