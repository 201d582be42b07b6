"""`--attention_backend`: diffusers' implementations of attention, and which of them can train on a device."""

import warnings

import torch
from diffusers.models.attention_dispatch import (
    _HUB_KERNELS_REGISTRY,
    AttentionBackendName,
    attention_backend,
    dispatch_attention_fn,
)

from .errors import InputError, first_line


# Batch, tokens, heads and channels per head of the input that a backend is tried on; the published models' heads have
# 128 channels.
TRIAL_SHAPE = (2, 64, 2, 128)
# Largest relative difference from torch's own attention. In bfloat16, rounding alone makes about a tenth of it.
TRIAL_TOLERANCE = 0.05


def check_attention_backend(name: str, device: torch.device, dtype: torch.dtype, *, masked: bool) -> None:
    """Checks that diffusers has the backend, and that attention with it can be trained on this device.

    Args:
        dtype: of the transformer.
        masked: whether the transformer masks tokens.

    Raises:
        InputError: with the names that work here.
    """
    trial = {"device": device, "dtype": dtype, "masked": masked}
    names = [backend.value for backend in AttentionBackendName]
    problem = backend_problem(name, **trial) if name in names else "diffusers has no such backend"
    if problem is None:
        return
    # Kernels of the Hub are code that only the user can choose to download.
    local = [other for other in names if AttentionBackendName(other) not in _HUB_KERNELS_REGISTRY]
    working = [other for other in local if backend_problem(other, **trial) is None]
    raise InputError(f"--attention_backend {name}: {problem}; these work here: {', '.join(working)}")


def backend_problem(name: str, *, device: torch.device, dtype: torch.dtype, masked: bool) -> str | None:
    """Why attention with this backend cannot be trained on the device, found by trying it; None if it can."""
    generator = torch.Generator().manual_seed(0)
    query, key, value, upstream = torch.randn(4, *TRIAL_SHAPE, generator=generator).to(device, dtype)
    mask = None
    if masked:
        mask = torch.ones(TRIAL_SHAPE[0], 1, 1, TRIAL_SHAPE[1], dtype=torch.bool, device=device)
        mask[1, ..., TRIAL_SHAPE[1] // 2 :] = False
        # What the masked tokens themselves see is of no consequence, and backends differ in it.
        upstream = upstream * mask[:, 0, 0, :, None, None]

    def attend(backend: str) -> list[torch.Tensor]:
        """The output and its gradients."""
        inputs = [tensor.detach().clone().requires_grad_() for tensor in (query, key, value)]
        with attention_backend(backend):
            output = dispatch_attention_fn(*inputs, attn_mask=mask)
            if not output.requires_grad:
                raise NotImplementedError("it has no backward pass")
            return [output.detach() * (upstream != 0), *torch.autograd.grad(output, inputs, upstream)]

    expected = attend("native")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = attend(name)
    except Exception as error:  # a missing package, or whatever a kernel raises
        return first_line(error).rstrip(".")
    differences = [
        ((one.float() - other.float()).norm() / other.float().norm()).item()
        for one, other in zip(found, expected, strict=True)
    ]
    if not max(differences) < TRIAL_TOLERANCE:
        return "its output or its gradients are not those of torch's attention" + (" with a mask" if masked else "")
    return None
