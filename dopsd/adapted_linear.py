"""A linear layer with LoRA adapters that adds their update in place."""

from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners import lora
from torch import nn
from torch.utils.flop_counter import flop_registry


# `FlopCounterMode` knows the out-of-place form only.
flop_registry.setdefault(torch.ops.aten.addmm_, flop_registry[torch.ops.aten.addmm])


class CastLinear(nn.Linear):
    """Linear layer that stores its weight in float32 and computes in the dtype of its input.

    With a bfloat16 input, peft's LoRA layers cast the input to float32 and keep that copy for the backward pass, and
    autocast would change the arithmetic of the frozen model. This layer does neither.
    """

    @classmethod
    def copy_of(cls, linear: nn.Linear) -> "CastLinear":
        copy = cls(linear.in_features, linear.out_features, bias=False, device="meta")
        copy.weight = nn.Parameter(linear.weight.detach().float())
        return copy

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight.to(x.dtype))


class AdaptedLinear(lora.Linear):
    """peft's LoRA layer, base(x) + scale * B A dropout(x), with one product that adds the update to the base's output.

    peft makes three tensors of the output's size: the update, its scaled copy and the sum. This layer makes none, or
    one if the base is quantized or has a bias. In float32, if the scale is a power of two, output and gradients are
    peft's bit for bit. Otherwise they differ by rounding: peft scales the update and rounds it before the sum.

    Attributes:
        peft_arithmetic: whether to compute as peft, and therefore as the stock pipeline does.
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str, **options: Any):
        super().__init__(base_layer, adapter_name, **options)
        self.peft_arithmetic = False
        # The input has the model's dtype, and the adapters cast themselves to it.
        self.cast_input_dtype_enabled = False
        # Quantized layers may return a view, which autograd forbids to change, or whose gradient it copies. With a
        # bias, torch rounds differently in some layouts of x, and the student would not start as the base model.
        is_plain = type(base_layer) is nn.Linear and type(base_layer.weight) is nn.Parameter
        self._adds_in_place = is_plain and base_layer.bias is None

    def store_in_float32(self) -> None:
        """Stores the weights of all adapters in float32."""
        for adapters in (self.lora_A, self.lora_B):
            for name, linear in adapters.items():
                adapters[name] = CastLinear.copy_of(linear)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """x: (..., in_features). Returns (..., out_features)."""
        if self.disable_adapters or self.peft_arithmetic:
            return super().forward(x, *args, **kwargs)
        (adapter,) = self.active_adapters
        # (tokens, out_features). What is changed in place is no view. Base and A each flatten x, so that autograd sums
        # its gradients in peft's order.
        if self._adds_in_place:
            result = self.base_layer(x.flatten(0, -2), *args, **kwargs)
        else:
            result = self.base_layer(x, *args, **kwargs).flatten(0, -2)
        hidden = self.lora_A[adapter](self.lora_dropout[adapter](x)).flatten(0, -2)  # (tokens, rank)
        B = self.lora_B[adapter].weight.to(x.dtype)
        add = result.addmm_ if self._adds_in_place else result.addmm
        return add(hidden, B.T, alpha=self.scaling[adapter]).unflatten(0, x.shape[:-1])
