"""Other values of the trained weights, such as the teacher's: where they are kept, and how they take the student's
place."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from .sharding import repeated_blocks


Swap = tuple[nn.Parameter, torch.Tensor]  # a weight, and the value that takes its place


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This process's part of a tensor, in the same memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def is_offloaded(tensor: torch.Tensor) -> bool:
    """Whether it is sharded and in host memory, but computes on an accelerator."""
    return isinstance(tensor, DTensor) and tensor.device_mesh.device_type != tensor.to_local().device.type


class WeightCopy:
    """A value for each trained weight, beside the student's.

    How it takes the student's place depends on where it is:

    - on the weights' device and of their dtype: by pointer, which costs nothing;
    - elsewhere, or of another dtype: block by block, each while it computes, so that the weights of two blocks are on
      the device at a time. On a GPU, the next block's weights are copied while a block computes;
    - if processes share the weights: each copies its part, which `fully_shard` gathers from a storage of its own.

    Args:
        transformer: with the weights on their device, and sharded if it is to be.
        weights: the trained ones, by name.
        dtype: of the values. Default: the weights' own.
        device: of the values.
    """

    def __init__(
        self,
        transformer: nn.Module,
        weights: dict[str, nn.Parameter],
        *,
        device: torch.device,
        dtype: torch.dtype | None = None,
    ):
        self.values = {name: copied(weight.detach(), device, dtype) for name, weight in weights.items()}
        self.swaps: list[Swap] = [(weight, self.values[name]) for name, weight in weights.items()]
        self.is_sharded = any(isinstance(weight, DTensor) for weight in weights.values())
        self.is_resident = all(
            value.device == weight.device and value.dtype == weight.dtype for weight, value in self.swaps
        )
        self.is_off_device = any(value.device != weight.device or is_offloaded(weight) for weight, value in self.swaps)
        self.blocks = [] if self.is_sharded or self.is_resident else blocks_of(transformer, self.swaps)

    def in_place(self) -> AbstractContextManager[None]:
        """Context in which the transformer computes with these values. No graph of the student's may be alive."""
        if self.is_sharded:
            return copied_in(self.swaps)
        return swapped(self.swaps) if self.is_resident else self.streamed()

    @torch.no_grad()
    def average_with(self, parameters: dict[str, nn.Parameter], share: float) -> None:
        """value <- (1 - share) * value + share * parameter, on the parameter's device, in the values' dtype.

        Args:
            parameters: by the names of the weights.
            share: of the parameters.
        """
        for name, value in self.values.items():
            value, parameter = local(value), local(parameters[name])
            moved = value.to(parameter.device, non_blocking=True)
            moved.lerp_(parameter.to(value.dtype), share)
            if moved is not value:
                value.copy_(moved, non_blocking=True)
        if self.is_off_device:
            torch.accelerator.synchronize()  # the copies to host memory

    @contextmanager
    def streamed(self) -> Iterator[None]:
        in_blocks = {weight for _, swaps in self.blocks for weight, _ in swaps}
        others = [(weight, on_device(weight, value)) for weight, value in self.swaps if weight not in in_blocks]
        stream = BlockStream(self.blocks)
        with swapped(others), stream:
            yield


def copied(weight: torch.Tensor, device: torch.device, dtype: torch.dtype | None) -> torch.Tensor:
    """A copy with memory of its own. What a GPU reads from host memory is pinned."""
    dtype = dtype or weight.dtype
    if weight.device.type == "cuda" and device.type == "cpu" and not isinstance(weight, DTensor):
        return torch.empty(weight.shape, dtype=dtype, pin_memory=True).copy_(weight)
    return weight.to(device, dtype, copy=True)


def on_device(weight: nn.Parameter, value: torch.Tensor) -> torch.Tensor:
    return value.to(weight.device, non_blocking=True).to(weight.dtype)


def blocks_of(transformer: nn.Module, swaps: list[Swap]) -> list[tuple[nn.Module, list[Swap]]]:
    """The repeated blocks, in the order in which they compute, each with its swaps."""
    value_of = dict(swaps)
    blocks = []
    for block in repeated_blocks(transformer):
        own = [(weight, value_of[weight]) for weight in block.parameters() if weight in value_of]
        if own:
            blocks.append((block, own))
    return blocks


@contextmanager
def swapped(swaps: list[Swap]) -> Iterator[None]:
    """Gives weights other values by pointer."""
    own = [weight.data for weight, _ in swaps]
    try:
        for weight, value in swaps:
            weight.data = value
        yield
    finally:
        for (weight, _), data in zip(swaps, own, strict=True):
            weight.data = data


@contextmanager
def copied_in(swaps: list[Swap]) -> Iterator[None]:
    """Gives this process's parts of sharded weights other values, and then their own again."""
    parts = [(local(weight.detach()), local(value)) for weight, value in swaps]
    own = [part.clone() for part, _ in parts]
    try:
        for part, value in parts:
            part.copy_(value, non_blocking=True)
        yield
    finally:
        for (part, _), value in zip(parts, own, strict=True):
            part.copy_(value)


class BlockStream:
    """Context in which each block has other weights while it computes.

    Args:
        blocks: with their swaps, in the order in which they compute.
    """

    def __init__(self, blocks: list[tuple[nn.Module, list[Swap]]]):
        self.blocks = blocks
        device = blocks[0][1][0][0].device if blocks else torch.device("cpu")
        self.side = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.coming: dict[int, list[torch.Tensor]] = {}
        self.own: dict[int, list[torch.Tensor]] = {}
        self.handles = []

    def __enter__(self) -> None:
        if self.side is not None:
            self.side.wait_stream(torch.cuda.current_stream())  # which may still be changing the values
        for index, (block, _) in enumerate(self.blocks):
            self.handles.append(block.register_forward_pre_hook(lambda *_, index=index: self.begin(index)))
            self.handles.append(block.register_forward_hook(lambda *_, index=index: self.end(index), always_call=True))

    def __exit__(self, *_) -> None:
        for handle in self.handles:
            handle.remove()
        for index in [*self.own]:
            self.end(index)
        self.coming.clear()

    def fetch(self, index: int) -> None:
        """Starts to copy a block's weights to the device."""
        if index >= len(self.blocks) or index in self.coming:
            return
        if self.side is None:
            self.coming[index] = [on_device(*swap) for swap in self.blocks[index][1]]
            return
        with torch.cuda.stream(self.side):
            self.coming[index] = [on_device(*swap) for swap in self.blocks[index][1]]

    def begin(self, index: int) -> None:
        self.fetch(index)
        values = self.coming.pop(index)
        if self.side is not None:
            current = torch.cuda.current_stream()
            current.wait_stream(self.side)
            for value in values:
                value.record_stream(current)
        self.own[index] = [weight.data for weight, _ in self.blocks[index][1]]
        for (weight, _), value in zip(self.blocks[index][1], values, strict=True):
            weight.data = value
        if self.side is not None:
            self.fetch(index + 1)

    def end(self, index: int) -> None:
        for (weight, _), data in zip(self.blocks[index][1], self.own.pop(index, []), strict=False):
            weight.data = data
