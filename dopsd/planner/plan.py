"""The plan of a run: bytes by phase, operations, time and disk."""

import math
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import psutil
import torch

from ..contexts import batches
from ..launch import weight_dtype
from ..settings import Settings
from .allocations import module_bytes
from .cards import Card
from .frozen import FrozenBytes, Placement, frozen_bytes, placement, transformer_bytes
from .reading import PlannedRun
from .simulation import Batch, PerState, StepCost, on_meta


# Share of a card's matrix product rate that a step reaches.
UTILIZATION = 0.5

# Passes through the transformer: the teacher's forward, the student's forward and backward; a passed state has one.
MOVES = PerState(trained=3, passed=1, trained_prior=3, passed_prior=1)

# From host memory to the card: PCIe 4.0 x16, of whose 31.5 GB/s copies of pinned memory reach about 25.
HOST_BYTES_PER_SECOND = 25e9


@dataclass(frozen=True)
class Phase:
    """A part of the run, with what is on the accelerator at its peak.

    Attributes:
        name: for the table.
        parts: what it is -> bytes.
    """

    name: str
    parts: dict[str, int]

    @property
    def peak(self) -> int:
        return sum(self.parts.values())


@dataclass(frozen=True)
class Plan:
    """What a run takes.

    Attributes:
        settings: which it was made for.
        batch: the largest micro-batch.
        phases: of the run, in order. With `--encode_only`, encoding only.
        host: bytes of host memory.
        mean_flops, max_flops: operations per optimizer step and process, on average and if the last states are drawn.
        moved: bytes of weights that come from host memory in an optimizer step, on average.
        overlaps: whether they come while the card computes.
        num_steps: optimizer steps.
        cache, checkpoint, lora: bytes on disk of the context cache, of one checkpoint and of the LoRA.
        num_checkpoints: that are kept.
    """

    settings: Settings
    batch: Batch
    phases: list[Phase]
    host: int
    mean_flops: float
    max_flops: float
    moved: float
    overlaps: bool
    num_steps: int
    cache: int
    checkpoint: int
    num_checkpoints: int
    lora: int

    @property
    def peak(self) -> int:
        return max(phase.peak for phase in self.phases)

    def too_large(self, card: Card) -> list[Phase]:
        return [phase for phase in self.phases if phase.peak > card.usable_bytes]

    def seconds_per_step(self, card: Card) -> float | None:
        """At `UTILIZATION` of the card's rate, with what `moving_seconds` adds."""
        if card.tflops is None:
            return None
        computing = self.mean_flops / (card.tflops * 1e12 * UTILIZATION)
        return max(computing, self.moving_seconds) if self.overlaps else computing + self.moving_seconds

    @property
    def moving_seconds(self) -> float:
        """In which the weights of a step come from host memory."""
        return self.moved / HOST_BYTES_PER_SECOND


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


class Planner:
    """Plans a run with its own settings, or with changed ones.

    Args:
        run: what was read.
        on_gpu: whether it is for a GPU or for this machine's CPU.
    """

    def __init__(self, run: PlannedRun, on_gpu: bool):
        self.run, self.on_gpu, self.simulator = run, on_gpu, run.simulator(on_gpu)
        # Many settings share a simulation.
        self.texts = cache(self.simulator.texts)
        self.picture = cache(self.simulator.picture)
        self.drawing = cache(self.simulator.drawing)
        self.module = cache(on_meta)
        self.steps: dict[Any, StepCost] = {}
        self.settings = run.settings

    def with_settings(self, **changed: Any) -> "Planner":
        """A planner with other values for these flags, which shares the simulations."""
        other = copy(self)
        other.settings = self.settings.replace(**changed)
        return other

    def plan(self, **changed: Any) -> Plan:
        """The plan with other values for these flags."""
        run = self.run
        settings = self.settings.replace(**changed)
        batch, dtype = run.batch(settings), weight_dtype(settings.training.mixed_precision)
        where, step = placement(settings, run.num_processes), self.step(settings, batch, dtype)
        frozen = transformer_bytes(self.module(run.build_transformer, dtype), where)
        resident = self.resident(settings, frozen, step.adapter)
        if settings.training.no_context_cache:
            resident["encoders"] = sum(self.encoder_bytes(where, dtype))
        phases = self.encoding(settings, where, dtype)
        if not settings.training.encode_only:
            phases.append(self.training(settings, resident, frozen, step))
            if settings.validation.validation_steps > 0:
                phases.append(self.drawing_phase(settings, resident, frozen, dtype))
        training = settings.training
        states = optimizer_bytes(settings, self.on_gpu).states
        num_adapters = 2 if settings.distillation.teacher == "ema" else 1
        num_checkpoints = training.max_train_steps // training.checkpointing_steps
        return Plan(
            settings,
            batch,
            phases,
            host=self.host(phases, frozen, step, where, dtype),
            mean_flops=in_step(settings, step.flops, mean_passed_states),
            max_flops=in_step(settings, step.flops, max_passed_states),
            moved=frozen.moved * in_step(settings, MOVES, mean_passed_states),
            overlaps=where.num_shards > 1,
            num_steps=training.max_train_steps,
            cache=0 if training.no_context_cache else run.contexts.num_bytes(run.encodings),
            checkpoint=round(step.adapter * (num_adapters + states)),
            num_checkpoints=min(num_checkpoints, training.checkpoints_total_limit or num_checkpoints),
            lora=step.adapter * (4 if settings.lora.upcast_before_saving else dtype.itemsize) // 4,
        )

    def step(self, settings: Settings, batch: Batch, dtype: torch.dtype) -> StepCost:
        # What the simulated step depends on.
        distillation, performance = settings.distillation, settings.performance
        key = (
            batch,
            dtype,
            settings.lora,
            distillation,
            performance.gradient_checkpointing,
            performance.offload_activations,
            settings.training.gradient_accumulation_steps > 1,
        )
        if key not in self.steps:
            options = self.run.lora_options | {"rank": settings.lora.rank}
            self.steps[key] = self.simulator.training(batch, settings, options, dtype)
        return self.steps[key]

    # Phases

    def encoder_bytes(self, where: Placement, dtype: torch.dtype) -> tuple[int, int, int]:
        """Of the text encoder, the vision tower and the VAE."""
        run = self.run
        encoders = run.contexts.conditioning.encoders
        towers = [encoder.vision_encoder for encoder in encoders if hasattr(encoder, "vision_encoder")]
        return (
            frozen_bytes(self.module(run.build_text_encoder, dtype), where.quantize_text_encoder).device,
            sum(tower.num_parameters() for tower in towers) * dtype.itemsize,
            module_bytes(self.module(run.build_vae, dtype)),
        )

    def encoding(self, settings: Settings, where: Placement, dtype: torch.dtype) -> list[Phase]:
        """Text encoder and VAE, one after the other."""
        run = self.run
        text_bytes, tower_bytes, vae_bytes = self.encoder_bytes(where, dtype)
        largest = 0
        for encoder in {
            encoding.encoder for encoding in run.encodings if encoding.encoder.component == "text_encoder"
        }:
            own = [encoding for encoding in run.encodings if encoding.encoder is encoder]
            if encoder.sees_picture:  # one at a time
                lengths = [math.prod(encoder.shape(one.prompt, one.sizes)) // encoder.width for one in own]
                shape = 1, max(lengths), False
            else:
                sizes = [(len(batch), encoder.batch_length(batch[0].prompt)) for batch in batches(own)]
                shape = *max(sizes, key=math.prod), True
            largest = max(largest, self.texts(*shape, dtype).peak)
        dequantized = frozen_bytes(self.module(run.build_text_encoder, dtype), where.quantize_text_encoder).dequantized
        phases = [
            Phase(
                "encoding: text encoder",
                {"weights": text_bytes + tower_bytes, "activations": largest + dequantized},
            )
        ]
        sizes = {run.encoded_size(one) for one in run.encodings if one.encoder.component == "vae"}
        if sizes:
            peak = self.picture(max(sizes, key=math.prod), dtype).peak
            phases.append(Phase("encoding: VAE", {"weights": vae_bytes, "activations": peak}))
        return phases

    def resident(self, settings: Settings, frozen: FrozenBytes, adapter: int) -> dict[str, int]:
        """What is on the accelerator from the first step to the last."""
        states = round(adapter * optimizer_bytes(settings, self.on_gpu).states)
        num_adapters = 2 if settings.distillation.teacher == "ema" else 1
        # Processes exchange gradients through buffers as large as the gradients.
        exchanged = adapter if self.run.num_processes > 1 and not settings.performance.is_sharded else 0
        return {"weights": frozen.device, "LoRA, EMA, optimizer": adapter * num_adapters + states + exchanged}

    def training(self, settings: Settings, resident: dict[str, int], frozen: FrozenBytes, step: StepCost) -> Phase:
        """Forward and backward passes, or the optimizer's step if that takes more."""
        stepping = round(step.adapter * (1 + optimizer_bytes(settings, self.on_gpu).step))
        working = max(step.peak + frozen.dequantized, stepping)
        return Phase("training", resident | {"gradients, activations": working})

    def drawing_phase(
        self, settings: Settings, resident: dict[str, int], frozen: FrozenBytes, dtype: torch.dtype
    ) -> Phase:
        """Preview and validation: the transformer predicts, then the VAE decodes beside it."""
        run, validation = self.run, settings.validation
        shown = run.batch(settings)
        drawn = replace(shown, size=(validation.validation_height, validation.validation_width))
        vae_bytes = module_bytes(self.module(run.build_vae, dtype))
        peak = 0
        for batch, context in ((shown, shown.teacher), (drawn, drawn.student)):
            one = Batch(batch.size, 1, student=context, teacher=context)
            sampling, decoding = self.drawing(one, dtype)
            peak = max(peak, sampling.peak + frozen.dequantized, decoding.peak + vae_bytes)
        return Phase("drawing", resident | {"activations, VAE": peak})

    def host(self, phases: list[Phase], frozen: FrozenBytes, step: StepCost, where: Placement, dtype) -> int:
        """Of this process: what it has loaded so far, and what a run keeps there."""
        loaded = psutil.Process().memory_info().rss
        if not self.on_gpu:
            return loaded + max(phase.peak for phase in phases)
        largest_weight = max(one.nbytes for one in self.module(self.run.build_transformer, dtype).parameters())
        vae = module_bytes(self.module(self.run.build_vae, dtype))
        return loaded + max(frozen.read, vae + frozen.host + step.in_host) + largest_weight


def mean_passed_states(num_states: int, num_trained: int) -> float:
    """States that the student passes before its last trained one, on average over all draws of `num_trained`."""
    return num_trained * (num_states + 1) / (num_trained + 1) - num_trained


def max_passed_states(num_states: int, num_trained: int) -> int:
    return num_states - num_trained


def in_step(settings: Settings, per_state: PerState, passed_states: Callable[[int, int], float]) -> float:
    """Total of an optimizer step. Prior preservation counts as often as it is computed."""
    distillation = settings.distillation
    num_trained = distillation.num_trained_states
    num_passed = passed_states(distillation.num_rollout_steps, num_trained)
    rollout = num_trained * per_state.trained + num_passed * per_state.passed
    total = settings.training.gradient_accumulation_steps * rollout
    if settings.prior.with_prior_preservation:
        prior = num_trained * per_state.trained_prior + num_passed * per_state.passed_prior
        total += settings.training.gradient_accumulation_steps * prior / settings.prior.prior_every
    return total
