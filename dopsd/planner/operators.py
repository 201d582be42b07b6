"""The operators of a GPU, for fake tensors on a machine without one."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_flop


aten = torch.ops.aten

# FLOPs of CPU attention, which torch's registry lacks.
_CPU_ATTENTION = {
    aten._scaled_dot_product_flash_attention_for_cpu: lambda query, key, value, *rest, **options: sdpa_flop(
        query, key, value
    ),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda grad, query, key, value, *rest, **options: (
        attention_backward_flop(query, key, value)
    ),
}


def attention_backward_flop(query: torch.Size, key: torch.Size, value: torch.Size) -> int:
    """Five matrix products, where the forward pass has two: it computes the scores again."""
    return sdpa_flop(query, key, value) * 5 // 2


class FusedRMSNorm(torch.autograd.Function):
    """What CUDA's fused kernel allocates and keeps: the input, the weight and one float32 number per row."""

    @staticmethod
    def forward(ctx, input: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(input, weight, input.new_empty(input.shape[:-1], dtype=torch.float32))
        return torch.empty_like(input)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        input, weight, _ = ctx.saved_tensors
        return torch.empty_like(input), torch.empty_like(weight) if ctx.needs_input_grad[1] else None


class FlashAttention(torch.autograd.Function):
    """What CUDA's flash attention allocates and keeps: its arguments, the result, and the rows' log sums of exponents.

    Its backward pass accumulates the queries' gradient in float32.
    """

    @staticmethod
    def forward(ctx, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        result, *others = aten._scaled_dot_product_flash_attention(query, key, value)
        ctx.save_for_backward(query, key, value, result, others[0])
        return result

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        query, key, value, result, log_sums = ctx.saved_tensors
        accumulated = query.new_empty(query.shape, dtype=torch.float32)
        gradients = aten._scaled_dot_product_flash_attention_backward(
            gradient,
            query,
            key,
            value,
            result,
            log_sums,
            *(None, None, query.shape[2], key.shape[2], 0.0, False, log_sums, log_sums),
        )
        del accumulated
        return gradients


def fused_rms_norm(self: nn.RMSNorm, input: torch.Tensor) -> torch.Tensor:
    return FusedRMSNorm.apply(input, self.weight)


def flash_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """`scaled_dot_product_attention`. A mask needs another kernel, which keeps the same."""
    if enable_gqa:
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    return FlashAttention.apply(query, key, value)


@contextmanager
def gpu_operators() -> Iterator[None]:
    """Context in which torch allocates for norms and attention what it would on a CUDA device."""
    norm = patch.object(nn.RMSNorm, "forward", fused_rms_norm)
    with norm, patch.object(F, "scaled_dot_product_attention", flash_attention):
        yield


class FlopCounter(TorchDispatchMode):
    """Counts floating point operations by torch's formulas. A multiplication with its addition counts as two.

    torch's own `FlopCounterMode` hooks into modules, which keeps recomputed activations alive: with it, a pass would
    have another peak of memory.

    Attributes:
        total: operations so far.
    """

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        packet = func._overloadpacket
        if packet in _CPU_ATTENTION:
            shapes = [leaf.shape if isinstance(leaf, torch.Tensor) else leaf for leaf in tree_leaves(args)]
            self.total += _CPU_ATTENTION[packet](*shapes)
        elif packet in flop_registry:
            self.total += flop_registry[packet](*args, **kwargs, out_val=result)
        return result
