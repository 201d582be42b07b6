"""Time, memory and gradients of loops, measured side by side."""

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from diffusers.training_utils import free_memory

from dopsd.model import FewStepPipeline
from dopsd.planner.allocations import AllocationTracker, storage_bytes


T = TypeVar("T")
Call = Callable[[], object]
Gradients = dict[str, torch.Tensor]


class Loop(Protocol):
    """Something that takes training steps.

    Attributes:
        parameters: the trained ones, by name.
        optimizer: of the parameters.
        pipeline: with the transformer.
        period: number of steps whose mean time is that of a long run.
    """

    parameters: dict[str, torch.nn.Parameter]
    optimizer: torch.optim.Optimizer
    pipeline: FewStepPipeline
    period: int

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None: ...

    def __call__(self) -> None:
        """Takes the next step."""

    def gradient_calls(self) -> list[Call]:
        """Steps from the same noise whose mean gradient is comparable to other loops'. May be empty."""


@dataclass(frozen=True)
class Seconds:
    """Time of a call.

    Attributes:
        wall: by the clock.
        busy: of this process's CPU threads, or of the GPU between the call's first and last operation.
    """

    wall: float
    busy: float


class CpuDevice:
    """Measures on a CPU. Of memory, it counts the storages that operators create (see `AllocationTracker`)."""

    def seconds(self, call: Call) -> Seconds:
        wall, busy = time.perf_counter(), time.process_time()
        call()
        return Seconds(time.perf_counter() - wall, time.process_time() - busy)

    def peak_bytes(self, call: Call, *, is_compiled: bool = False) -> int | None:
        """Most bytes that are allocated at a time beyond those before the call; None if that cannot be seen.

        Args:
            is_compiled: whether the call runs compiled kernels, which allocate out of the tracker's sight.
        """
        gc.collect()
        if is_compiled:
            call()
            return None
        with AllocationTracker() as tracker:
            call()
        return tracker.peak


class CudaDevice:
    """Measures on a GPU, by its events and by torch's allocator."""

    def seconds(self, call: Call) -> Seconds:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        wall = time.perf_counter()
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return Seconds(time.perf_counter() - wall, start.elapsed_time(end) / 1000)

    def peak_bytes(self, call: Call, *, is_compiled: bool = False) -> int | None:
        """See `CpuDevice.peak_bytes`."""
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before


Device = CpuDevice | CudaDevice


def resident_bytes(loop: Loop) -> int:
    """Bytes of the transformer with its adapters and of the optimizer's states: what is there between steps."""
    transformer = loop.pipeline.transformer
    states = [state for states in loop.optimizer.state.values() for state in states.values()]
    return storage_bytes([*transformer.parameters(), *transformer.buffers(), *states])


def start_optimizer(loop: Loop) -> None:
    """Makes the optimizer's states, which are there in all steps but the first. Gradients of 0 change no weight."""
    for parameter in loop.parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    loop.optimizer.step()
    loop.optimizer.zero_grad()


@dataclass(frozen=True)
class FirstSteps:
    """What the first steps of a loop show.

    Attributes:
        gradients: the mean over the steps, float32 on the CPU, as the optimizer gets them.
        peak_bytes: the largest of `CpuDevice.peak_bytes`.
    """

    gradients: Gradients
    peak_bytes: int | None


def take_first_steps(device: Device, loop: Loop, calls: list[Call], *, is_compiled: bool = False) -> FirstSteps:
    """Makes these calls of the loop, each of which is a step."""
    gradients: Gradients = {}

    def add(*_) -> None:
        for name, parameter in loop.parameters.items():
            gradient = parameter.grad.float().cpu() / len(calls)
            gradients[name] = gradients[name] + gradient if name in gradients else gradient

    if is_compiled:
        calls[0]()  # compilation itself needs memory
    handle = loop.optimizer.register_step_pre_hook(add)
    peaks = [device.peak_bytes(call, is_compiled=is_compiled) for call in calls]
    handle.remove()
    return FirstSteps(gradients, None if None in peaks else max(peaks))


def largest_difference(gradients: Gradients, reference: Gradients) -> float:
    """The largest distance of a parameter's gradient from the reference, relative to the norm of the latter."""
    assert gradients.keys() == reference.keys()
    return max(((gradients[name] - other).norm() / other.norm()).item() for name, other in reference.items())


def measure_pairs(device: Device, loops: dict[str, list[Call]], num_pairs: int) -> dict[str, list[Seconds]]:
    """Times the loops one after the other, `num_pairs` times, forwards and backwards in turn.

    Args:
        loops: name -> calls, whose mean time counts.
    """
    times: dict[str, list[Seconds]] = {name: [] for name in loops}
    for pair in range(num_pairs):
        for name in list(loops)[:: 1 if pair % 2 == 0 else -1]:
            each = [device.seconds(call) for call in loops[name]]
            wall, busy = (statistics.mean(getattr(one, kind) for one in each) for kind in ("wall", "busy"))
            times[name].append(Seconds(wall, busy))
    return times


def ratios(times: list[Seconds], others: list[Seconds]) -> list[float]:
    """Busy time relative to the other's, pair by pair."""
    return [one.busy / other.busy for one, other in zip(times, others, strict=True)]


def unless_out_of_memory(function: Callable[[], T]) -> T | None:
    """What the function returns; None if the device runs out of memory, all of which is free again then."""
    try:
        return function()
    except torch.OutOfMemoryError:
        pass
    free_memory()
    return None
