"""Weights that are not on the accelerator as a whole: in host memory, or shared among processes.

Both are torch's `fully_shard` (FSDP2): a block's weights come for its forward and for its backward, and leave
afterwards. Processes that share weights collect the next block's while a block computes; with one process, torch 2.13
copies them when the block before is through. Adapters, their optimizer and the weights outside of the blocks are on
every process as a whole, so that roles, EMA, checkpoints and export are what they are without it. Without adapters,
each process holds a part of all weights, of their gradients, averages and optimizer states.
"""

import os
from collections.abc import Collection, Iterable
from itertools import pairwise

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.logging import get_logger
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from .contexts import in_units
from .settings import PerformanceSettings


logger = get_logger(__name__)


def calls_must_match(settings: PerformanceSettings, accelerator: Accelerator) -> bool:
    """Whether every process must call the transformer as often as the others, because each holds a part of it."""
    return settings.is_sharded and accelerator.num_processes > 1


def repeated_blocks(transformer: torch.nn.Module) -> list[torch.nn.Module]:
    """The blocks that diffusers lists as repeated, in the model's order. `fully_shard` derives their class anew."""
    names = {*(getattr(transformer, "_repeated_blocks", None) or ())}
    return [module for module in transformer.modules() if names & {kind.__name__ for kind in type(module).__mro__}]


def shard(
    transformer: torch.nn.Module,
    adapters: Collection[torch.nn.Parameter] | None,
    settings: PerformanceSettings,
    accelerator: Accelerator,
) -> None:
    """Spreads the weights over processes, or leaves them in host memory.

    Args:
        transformer: on the CPU, with its adapters. Its class becomes one of torch's, derived from its own.
        adapters: parameters that every process keeps as a whole, with all others that are not in a block; the blocks'
            are then frozen. None if the transformer itself is trained: all weights are then shared among all
            processes, whose gradients are averaged in the backward pass.
    """
    device = accelerator.device
    policy = OffloadPolicy()
    if settings.offload_transformer:
        policy = CPUOffloadPolicy(pin_memory=device.type != "cpu")
    mesh = process_mesh(accelerator, within_machines=adapters is not None)
    options = {"mesh": mesh, "offload_policy": policy, "reshard_after_forward": True}
    if adapters is None:
        options["mp_policy"] = MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in repeated_blocks(transformer):
        fully_shard(block, ignored_params={*(adapters or ())}, **options)
    whole = set()
    if adapters is not None:
        whole = {parameter for parameter in transformer.parameters() if not isinstance(parameter, DTensor)}
    # As the root, it lets the blocks share their streams.
    fully_shard(transformer, ignored_params=whole, **options)
    with torch.no_grad():
        for tensor in (*whole, *transformer.buffers()):
            tensor.data = tensor.data.to(device)
    pieces = [parameter for parameter in transformer.parameters() if isinstance(parameter, DTensor)]
    held = sum(piece.to_local().nbytes for piece in pieces)
    place = "in host memory" if settings.offload_transformer else "on its device"
    part = "Transformer" if adapters is None else "Transformer blocks"
    logger.info(
        f"{part}: {in_units(sum(piece.numel() * piece.element_size() for piece in pieces))} of weights; "
        f"each process holds {in_units(held)} of them {place}"
    )


def processes_per_machine(num_processes: int) -> int:
    """Of this machine, as the launcher says; all of them without a launcher."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", num_processes))


def process_mesh(accelerator: Accelerator, *, within_machines: bool = True) -> DeviceMesh:
    """The processes that share the weights: those of one machine, or all.

    If machines have different numbers of processes, all of them share.

    Args:
        within_machines: for weights that have no gradients to exchange.
    """
    if not dist.is_initialized():
        open_process_group(accelerator.device)
    device_type, num_processes = accelerator.device.type, accelerator.num_processes
    per_machine = processes_per_machine(num_processes)
    on_each = torch.tensor([float(per_machine)], device=accelerator.device)
    differ = (accelerator.gather(on_each) != per_machine).any() or num_processes % per_machine
    if differ or not within_machines:
        per_machine = num_processes
    shape = (num_processes // per_machine, per_machine)
    return init_device_mesh(device_type, shape, mesh_dim_names=("machine", "process"))["process"]


def open_process_group(device: torch.device) -> None:
    """A group of this process alone, which `fully_shard` needs."""
    # Gloo for sums of gradients that are in host memory.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" and dist.is_nccl_available() else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


@torch.no_grad()
def average_gradients(parameters: Iterable[torch.nn.Parameter], num_processes: int) -> None:
    """Replaces each gradient by its mean over the processes, as DDP does for parameters that it knows."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    torch._foreach_div_(gradients, num_processes)
    for work in [dist.all_reduce(gradient, async_op=True) for gradient in gradients]:
        work.wait()


def missing_calls(trained: list[int], by_process: Iterable[list[int]]) -> list[int]:
    """How many calls a process lacks before each of its trained states, compared with the process that makes most.

    Args:
        trained: this process's trained states, in order.
        by_process: those of all processes; each has as many.

    Returns:
        One number per trained state. A process that makes so many more calls before it calls the transformer as often
        as all others do, in the same order of forwards and backwards.
    """
    most = map(max, zip(*map(passed_states, by_process), strict=True))
    return [count - own for count, own in zip(most, passed_states(trained), strict=True)]


def passed_states(trained: list[int]) -> list[int]:
    """The number of untrained states between each trained state and the one before it."""
    return [state - before - 1 for before, state in pairwise([-1, *trained])]
