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
from ..weight_bytes import weight_bytes
from .allocations import module_bytes
from .cards import RESERVED_BYTES, Card
from .frozen import FrozenBytes, Placement, frozen_bytes, placement, transformer_bytes
from .reading import PlannedRun
from .simulation import Batch, StepCost, on_meta
from .trained import Kept, KeptAdapters, KeptWeights, PerState, weight_counts


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
        loaded: bytes of host memory that this process takes already.
        in_host: bytes of host memory that the run takes besides.
        mean_flops, max_flops: operations per optimizer step and process, on average and if the last states are drawn.
        moved: bytes of weights that come from host memory, or go there, in an optimizer step, on average.
        overlaps: whether they come while the card computes.
        num_steps: optimizer steps.
        cache, checkpoint, product: bytes on disk of the context cache, of one checkpoint, and of the LoRA or the
            transformer.
        num_checkpoints: that are kept.
    """

    settings: Settings
    batch: Batch
    phases: list[Phase]
    loaded: int
    in_host: int
    mean_flops: float
    max_flops: float
    moved: float
    overlaps: bool
    num_steps: int
    cache: int
    checkpoint: int
    num_checkpoints: int
    product: int

    @property
    def peak(self) -> int:
        return max(phase.peak for phase in self.phases)

    @property
    def host(self) -> int:
        """Bytes of host memory."""
        return self.loaded + self.in_host

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


class Planner:
    """Plans a run with its own settings, or with changed ones.

    Args:
        run: what was read.
        on_gpu: whether it is for a GPU or for this machine's CPU.
        card: the GPU. `--ema_device auto` depends on it; without one, it is taken to be large enough.
    """

    def __init__(self, run: PlannedRun, on_gpu: bool, card: Card | None = None):
        self.run, self.on_gpu, self.card, self.simulator = run, on_gpu, card, run.simulator(on_gpu)
        self.num_processes = run.num_processes
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

    def on(self, card: Card | None = None, num_processes: int | None = None) -> "Planner":
        """A planner for another card, or for another number of processes, which shares the simulations."""
        other = copy(self)
        other.card, other.num_processes = card or self.card, num_processes or self.num_processes
        return other

    def plan(self, **changed: Any) -> Plan:
        """The plan with other values for these flags."""
        run = self.run
        settings = self.settings.replace(**changed)
        batch, dtype = run.batch(settings), weight_dtype(settings.training.mixed_precision)
        where, step = placement(settings, self.num_processes), self.step(settings, batch, dtype)
        frozen = transformer_bytes(self.module(run.build_transformer, dtype), where)
        kept = self.kept(settings, frozen, where, step, dtype)
        resident = {"weights": frozen.device, **kept.device}
        if settings.training.no_context_cache:
            resident["encoders"] = sum(self.encoder_bytes(where, dtype))
        phases = self.encoding(settings, where, dtype)
        if not settings.training.encode_only:
            phases.append(self.training(settings, resident, frozen, kept, step))
            if settings.validation.validation_steps > 0:
                phases.append(self.drawing_phase(settings, resident, frozen, kept, dtype))
        training = settings.training
        num_checkpoints = training.max_train_steps // training.checkpointing_steps
        moved = frozen.moved * in_step(settings, MOVES, mean_passed_states)
        moved += in_step(settings, kept.moved, mean_passed_states) + kept.averaged
        # Before a role is asked once, the student walks the trained states too, but for the last.
        teacher, base = kept.batches_teacher
        walked = PerState(0, step.flops.passed * teacher, 0, step.flops.passed_prior * base)
        walking = in_step(settings, walked, lambda num_states, num_trained: num_trained - 1)
        return Plan(
            settings,
            batch,
            phases,
            loaded=psutil.Process().memory_info().rss,
            in_host=self.in_host(phases, frozen, kept, step, dtype),
            mean_flops=in_step(settings, step.flops, mean_passed_states) + walking,
            max_flops=in_step(settings, step.flops, max_passed_states) + walking,
            moved=moved,
            overlaps=where.num_shards > 1,
            num_steps=training.max_train_steps,
            cache=0 if training.no_context_cache else run.contexts.num_bytes(run.encodings),
            # Each holds what the run saves too; a LoRA is small beside the optimizer's states.
            checkpoint=kept.checkpoint + kept.product * settings.full.is_full,
            num_checkpoints=min(num_checkpoints, training.checkpoints_total_limit or num_checkpoints),
            product=kept.product,
        )

    def step(self, settings: Settings, batch: Batch, dtype: torch.dtype) -> StepCost:
        # What the simulated step depends on.
        distillation, performance, full = settings.distillation, settings.performance, settings.full
        key = (
            batch,
            dtype,
            distillation,
            (full.rounds_at_random, performance.is_sharded) if full.is_full else settings.lora,
            performance.gradient_checkpointing,
            performance.offload_activations,
            settings.training.gradient_accumulation_steps > 1,
        )
        if key not in self.steps:
            trained = self.run.trained_names
            if not full.is_full:
                # Its alpha takes no memory; the run of a whole model has none.
                trained = self.run.lora_options | {"rank": settings.lora.rank, "alpha": settings.lora.rank}
            self.steps[key] = self.simulator.training(batch, settings, trained, dtype)
        return self.steps[key]

    def kept(
        self, settings: Settings, frozen: FrozenBytes, where: Placement, step: StepCost, dtype: torch.dtype
    ) -> Kept:
        """What training keeps of what it trains, in the process that saves."""
        if not settings.full.is_full:
            exchanges = self.num_processes > 1 and not settings.performance.is_sharded
            return KeptAdapters(settings, step.trained, dtype, exchanges, self.on_gpu)
        counts = weight_counts(self.module(self.run.build_transformer, dtype), self.run.trained_names)
        each = weight_bytes(settings, dtype, has_prior=settings.prior.with_prior_preservation)
        has_copies = settings.full.ema_device != "cpu" and not where.offload_transformer
        if has_copies and settings.full.ema_device == "auto" and self.card is not None:
            total = self.card.memory_gb * 1e9
            free = total - RESERVED_BYTES - frozen.device
            has_copies = each.copies_fit(sum(counts.trained) // where.num_shards, free, total)
        return KeptWeights(settings, counts, each, dtype, where, has_copies or not self.on_gpu, self.on_gpu)

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

    def training(
        self, settings: Settings, resident: dict[str, int], frozen: FrozenBytes, kept: Kept, step: StepCost
    ) -> Phase:
        """Forward and backward passes, or the optimizer's step if that takes more."""
        num_trained = settings.distillation.num_trained_states
        batches_teacher, batches_base = kept.batches_teacher
        # The teacher's first call comes before the first backward pass.
        num_calls = settings.training.gradient_accumulation_steps * (1 if batches_teacher else num_trained)
        passes = [
            step.peak + kept.in_backward,
            step.teacher_work * (num_trained if batches_teacher else 1)
            + kept.in_teacher
            + kept.gradients * (num_calls > 1),
        ]
        if settings.prior.with_prior_preservation:
            base = step.prior_work * (num_trained if batches_base else 1)
            passes.append(base + kept.in_base + kept.gradients)
        working = max(max(passes) + frozen.dequantized, kept.stepping)
        return Phase("training", resident | {"gradients, activations": working})

    def drawing_phase(
        self, settings: Settings, resident: dict[str, int], frozen: FrozenBytes, kept: Kept, dtype: torch.dtype
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
        return Phase("drawing", resident | {"activations, VAE": peak + max(kept.in_teacher, kept.in_base)})

    def in_host(self, phases: list[Phase], frozen: FrozenBytes, kept: Kept, step: StepCost, dtype: torch.dtype) -> int:
        """Of this process: what the run reads, and then keeps there."""
        if not self.on_gpu:
            return max(phase.peak for phase in phases)
        largest_weight = max(one.nbytes for one in self.module(self.run.build_transformer, dtype).parameters())
        vae = module_bytes(self.module(self.run.build_vae, dtype))
        return max(frozen.read, vae + frozen.host + kept.host + step.in_host) + largest_weight


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
