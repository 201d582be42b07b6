"""What training keeps of what it trains: adapters, or the transformer's own weights."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import nn

from ..settings import Settings
from ..sharding import repeated_blocks
from ..weight_bytes import WeightBytes
from .allocations import pinned_bytes
from .frozen import Placement


FLOAT32 = torch.float32.itemsize


@dataclass(frozen=True)
class PerState:
    """Something that is done for each state of a rollout.

    Attributes:
        trained: for a trained state: the teacher's forward, the student's forward and backward.
        passed: for a state that the student only passes.
        trained_prior, passed_prior: the same for prior preservation.
    """

    trained: int
    passed: int
    trained_prior: int = 0
    passed_prior: int = 0


class Kept(ABC):
    """Bytes of what is trained, besides the transformer's weights.

    Attributes:
        gradients: on the accelerator between backward passes.
        in_backward: on the accelerator during the student's, beside what the simulated step counts.
        in_teacher, in_base: on the accelerator while the transformer is the teacher or the base model.
        host: in host memory.
        moved: to and from the accelerator.
        averaged: to and from the accelerator after each step, for the teacher's average.
        batches_teacher: whether the teacher, and the base model, are called once for all trained states of a rollout.
    """

    in_backward = in_teacher = in_base = host = averaged = 0
    moved = PerState(0, 0)
    batches_teacher = False, False

    @property
    @abstractmethod
    def device(self) -> dict[str, int]:
        """What it is -> bytes on the accelerator from the first step to the last."""

    @property
    @abstractmethod
    def gradients(self) -> int: ...

    @property
    @abstractmethod
    def stepping(self) -> int:
        """On the accelerator in the optimizer's step: gradients, and what the step allocates."""

    @property
    @abstractmethod
    def checkpoint(self) -> int:
        """On disk, of a checkpoint without the product."""

    @property
    @abstractmethod
    def product(self) -> int:
        """On disk, of what is saved: the LoRA, or the transformer."""


def saved_itemsize(settings: Settings, dtype: torch.dtype) -> int:
    return FLOAT32 if settings.lora.upcast_before_saving else dtype.itemsize


# A LoRA


@dataclass(frozen=True)
class OptimizerBytes:
    """In units of an adapter's bytes, which are float32.

    Attributes:
        states: that the optimizer keeps.
        step: what its step allocates besides.
    """

    states: float
    step: float


# One 8-bit number for each of two moments, and a float32 scale for 256 numbers.
EIGHT_BITS = 2 * (1 / 4 + 1 / 256)


def optimizer_bytes(settings: Settings, on_gpu: bool) -> OptimizerBytes:
    """Of AdamW, with two moments, or Prodigy, which also keeps where it started and a sum of gradients.

    On a GPU, torch's AdamW takes the square roots of all second moments at once.
    """
    if settings.optimizer.optimizer == "prodigy":
        return OptimizerBytes(4, 0)
    if settings.optimizer.use_8bit_adam:
        return OptimizerBytes(EIGHT_BITS, 0)
    return OptimizerBytes(2, 1 if on_gpu else 0)


@dataclass(frozen=True)
class KeptAdapters(Kept):
    """Of a LoRA.

    Args:
        adapter: bytes of one adapter.
        dtype: of the frozen weights.
        exchanges: whether processes exchange gradients, through buffers as large as the gradients.
    """

    settings: Settings
    adapter: int
    dtype: torch.dtype
    exchanges: bool
    on_gpu: bool

    @property
    def optimizer(self) -> OptimizerBytes:
        return optimizer_bytes(self.settings, self.on_gpu)

    @property
    def device(self) -> dict[str, int]:
        return {"LoRA, EMA, optimizer": self.checkpoint + self.adapter * self.exchanges}

    @property
    def gradients(self) -> int:
        return self.adapter

    @property
    def stepping(self) -> int:
        return round(self.adapter * (1 + self.optimizer.step))

    @property
    def checkpoint(self) -> int:
        num_adapters = 2 if self.settings.distillation.teacher == "ema" else 1
        return round(self.adapter * (num_adapters + self.optimizer.states))

    @property
    def product(self) -> int:
        return self.adapter * saved_itemsize(self.settings, self.dtype) // FLOAT32


# The transformer's own weights


@dataclass(frozen=True)
class WeightCounts:
    """How many numbers a transformer has.

    Attributes:
        trained: of each trained weight.
        blocks: trained ones in each repeated block.
        whole: all of them, trained or not.
    """

    trained: list[int]
    blocks: list[int]
    whole: int

    @property
    def outside(self) -> int:
        """Trained ones outside of the blocks."""
        return sum(self.trained) - sum(self.blocks)


def weight_counts(transformer: nn.Module, names: list[str]) -> WeightCounts:
    """Of a transformer whose parameters of these names are trained."""
    weights, names = dict(transformer.named_parameters()), {*names}
    trained = {weight: weight.numel() for name, weight in weights.items() if name in names}
    blocks = [sum(trained.get(weight, 0) for weight in block.parameters()) for block in repeated_blocks(transformer)]
    return WeightCounts([*trained.values()], blocks, sum(weight.numel() for weight in weights.values()))


# Bytes that an optimizer's step takes on a CPU, per number of the weight that it is at: torchao's computes in float32,
# and rounds at random with 32-bit integers. On a GPU torch's is fused and torchao's compiled.
STEP_BYTES, TORCHAO_BYTES, ROUNDING_BYTES = 8, 24, 41


@dataclass(frozen=True)
class KeptWeights(Kept):
    """Of `--train_mode full`, in one process.

    Args:
        counts: of the transformer.
        each: bytes per weight.
        dtype: of the weights.
        where: they are.
        has_copies: whether the teacher's and the base model's weights are on the accelerator.
    """

    settings: Settings
    counts: WeightCounts
    each: WeightBytes
    dtype: torch.dtype
    where: Placement
    has_copies: bool
    on_gpu: bool

    @property
    def part(self) -> int:
        """Trained weights of this process."""
        return -(-sum(self.counts.trained) // self.where.num_shards)

    @property
    def has_base(self) -> bool:
        """On the accelerator. A CPU's memory holds it in any case."""
        return self.has_copies and (self.each.has_base or not self.on_gpu)

    @property
    def device(self) -> dict[str, int]:
        if self.where.offload_transformer:
            return {}
        each = self.each
        copies = each.ema * self.has_copies + each.base * self.has_base
        sizes = {"master weights": each.master, "EMA, base": copies, "optimizer": each.states}
        return {name: round(self.part * size) for name, size in sizes.items() if size}

    @property
    def host(self) -> int:
        """Copies, the student while it is saved and, if the weights are there, all that is kept of them."""
        each = self.each
        saved = self.product if self.settings.full.extract_lora is None else self.counts.whole * FLOAT32
        copies = each.ema * (not self.has_copies), each.base * (not self.has_base)
        if not self.where.is_shared:
            return saved + sum(pinned_bytes(count * size) for count in self.counts.trained for size in copies)
        here = sum(copies)
        if self.where.offload_transformer:
            here += each.gradient + each.master + each.states + each.base  # the student's part during a role
        return saved + round(self.part * here)

    @property
    def gradients(self) -> int:
        return 0 if self.where.offload_transformer else self.part * self.each.gradient

    @property
    def in_backward(self) -> int:
        """Of shared weights: gradients, a block's whole ones, and the float32 numbers in which processes add them."""
        if not self.where.is_shared:
            return 0
        own = self.dtype.itemsize
        buffers = max(self.counts.blocks, default=0) * (own + FLOAT32) + self.counts.outside * own
        return self.gradients + buffers

    @property
    def in_teacher(self) -> int:
        return {"ema": self.in_average, "base": self.in_base, "student": 0}[self.settings.distillation.teacher]

    @property
    def in_base(self) -> int:
        return self.own_part if self.where.is_shared else self.streamed * (not self.has_base)

    @property
    def in_average(self) -> int:
        """Its float32 numbers are cast on the accelerator, weight by weight."""
        if self.where.is_shared:
            return self.own_part
        if self.has_copies and self.dtype == torch.float32:
            return 0
        is_cast_here = not self.has_copies and self.dtype != torch.float32
        return self.streamed + self.each.ema * max(self.counts.trained) * is_cast_here

    @property
    def own_part(self) -> int:
        """The student's part of shared weights, while another role's is in its place."""
        return 0 if self.where.offload_transformer else self.part * self.dtype.itemsize

    @property
    def streamed(self) -> int:
        """The block that computes, on a GPU also the next one, and all that is in no block."""
        blocks = sorted(self.counts.blocks)[-2 if self.on_gpu else -1 :]
        return (sum(blocks) + self.counts.outside) * self.dtype.itemsize

    @property
    def stepping(self) -> int:
        return self.gradients + (0 if self.on_gpu else max(self.counts.trained) * self.step_bytes)

    @property
    def step_bytes(self) -> int:
        if self.settings.full.rounds_at_random and self.dtype != torch.float32:
            return ROUNDING_BYTES
        return TORCHAO_BYTES if self.settings.optimizer.use_8bit_adam else STEP_BYTES

    @property
    def moved(self) -> PerState:
        """Copies that are not on the accelerator, or gradients that leave it."""
        if self.where.offload_transformer:
            gradients = self.part * self.dtype.itemsize
            return PerState(gradients, 0, gradients, 0)
        sizes = {"ema": self.each.ema, "base": self.each.base, "student": 0}
        names = self.settings.distillation.teacher, "base"
        # All trained states of a rollout share a call.
        share = self.part * (not self.has_copies) / self.settings.distillation.num_trained_states
        teacher, base = (round(share * sizes[name]) for name in names)
        return PerState(teacher, 0, base, 0)

    @property
    def batches_teacher(self) -> tuple[bool, bool]:
        is_far = not self.has_copies and not self.where.offload_transformer
        several = self.settings.distillation.num_trained_states > 1
        return several and is_far and self.settings.distillation.teacher != "student", several and is_far

    @property
    def averaged(self) -> int:
        is_far = not self.has_copies and not self.where.offload_transformer
        return 2 * self.part * self.each.ema * is_far

    @property
    def checkpoint(self) -> int:
        each = self.each
        return round(sum(self.counts.trained) * ((each.master or self.dtype.itemsize) + each.ema + each.states))

    @property
    def product(self) -> int:
        return self.counts.whole * saved_itemsize(self.settings, self.dtype)
