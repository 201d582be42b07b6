"""Distils the closed-form teacher into the miniature's transformer: one average velocity per deployed step.

The student learns v = (x_{k+1} - x_k) / (sigma_{k+1} - sigma_k), where the teacher's ODE leads from x_k at sigma_k to
x_{k+1} at sigma_{k+1}. It first trains at the teacher's states, then mostly at states that its own steps reach, which
is possible because the teacher's ODE can start anywhere.
"""

import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import torch
from diffusers import ModelMixin
from diffusers.models.attention_dispatch import attention_backend

from benchmarks.miniature.architecture import Architecture
from benchmarks.miniature.rows import ROW_KINDS, Rows, RowSource
from benchmarks.miniature.teacher import PosteriorTeacher
from benchmarks.miniature.training import MuonAdamW, autocast, load_or_none, save_state, trapezoid


EMA_DECAY = 0.998
# The share of steps along a trajectory that the student makes, instead of the teacher, grows to STUDENT_SHARE over
# this many updates. Only at its own states does the student learn to decide what it has left undecided; without them
# objects have no clean edges.
STUDENT_SHARE, STUDENT_SHARE_STEPS = 0.9, 600
# A nonsense word allows such different pictures that one direction does not tell them apart (see `PosteriorTeacher`).
UNKNOWN_DIRECTIONS = 4
MINUTES_PER_SAVE = 4
STEPS_PER_LOG = 50


@dataclass(frozen=True)
class Settings:
    """Settings of the distillation.

    Attributes:
        rows_per_slot: rows of each kind in each of the architecture's slots.
        muon_lr, adamw_lr: peak learning rates.
        num_steps: updates.
        minutes_per_evaluation: wall-clock time.
        seed: seed for the initial weights and the rows.
        student_share_steps: updates over which the share of the student's own steps grows to `STUDENT_SHARE`.
        decay_share: share of the updates, the last ones, over which the learning rate decays.
    """

    rows_per_slot: dict[str, int]
    muon_lr: float
    adamw_lr: float
    num_steps: int
    minutes_per_evaluation: float
    seed: int
    student_share_steps: int = STUDENT_SHARE_STEPS
    decay_share: float = 0.2


class RolloutBuffer:
    """Rows of one kind in all segments at once. After every update they move on to the next segment.

    Args:
        kind: see `RowSource.draw`.
        rows_per_slot: rows in each of the architecture's slots.
    """

    def __init__(self, kind: str, rows_per_slot: int, source: RowSource, teacher: PosteriorTeacher):
        self.kind, self.rows_per_slot, self.source, self.teacher = kind, rows_per_slot, source, teacher
        self.architecture = source.architecture
        self.segments = torch.tensor(self.architecture.slots).repeat_interleave(rows_per_slot)
        self.slots: list[Rows] = []

    def next_rows(self, rng: np.random.Generator) -> Rows:
        """The rows to train on, at `segments`. The first call fills every slot with the teacher's states."""
        self.slots = [
            self._new_rows(segment, rng)
            if slot in self.architecture.entry_slots or not self.slots
            else self.slots[slot - 1]
            for slot, segment in enumerate(self.architecture.slots)
        ]
        return Rows(
            self.architecture.join([rows.context for rows in self.slots]),
            torch.cat([rows.means for rows in self.slots]),
            torch.cat([rows.states for rows in self.slots]),
        )

    def store(self, states: torch.Tensor) -> None:
        """Stores the states at the end of the segments, where `next_rows` continues."""
        for rows, part in zip(self.slots, states.chunk(len(self.slots)), strict=True):
            rows.states = part

    def targets(self, rows: Rows) -> torch.Tensor:
        """The states to which the teacher's ODE leads by the end of the rows' segments."""
        return self.teacher.advance(rows.states, self.segments, rows.means)

    def _new_rows(self, segment: int, rng: np.random.Generator) -> Rows:
        rows = self.source.draw(self.kind, self.rows_per_slot, rng)
        for index in range(segment):
            rows.states = self.teacher.advance(rows.states, torch.full((self.rows_per_slot,), index), rows.means)
        return rows


@dataclass
class TrainingState:
    """Everything that a stopped distillation needs to continue, except the rows in its buffers.

    Attributes:
        averaged: the transformer with the exponential moving average of the weights, frozen.
        step: updates so far.
        minutes: wall-clock time so far.
    """

    transformer: ModelMixin
    averaged: ModelMixin
    optimizer: MuonAdamW
    step: int = 0
    minutes: float = 0.0

    @classmethod
    def open(
        cls,
        path: Path,
        architecture: Architecture,
        settings: Settings,
        initial_weights: dict[str, torch.Tensor] | None = None,
    ) -> Self:
        """A new state with these weights, or with random ones; or the one that was saved at `path`."""
        torch.manual_seed(settings.seed)
        transformer = architecture.make_transformer()
        if initial_weights is not None:
            transformer.load_state_dict(initial_weights)
        averaged = architecture.make_transformer().eval().requires_grad_(False)
        averaged.load_state_dict(transformer.state_dict())
        optimizer = MuonAdamW(transformer, muon_lr=settings.muon_lr, adamw_lr=settings.adamw_lr)
        state = cls(transformer, averaged, optimizer)
        if saved := load_or_none(path):
            transformer.load_state_dict(saved["transformer"])
            averaged.load_state_dict(saved["averaged"])
            optimizer.load_state_dict(saved["optimizer"])
            state.step, state.minutes = saved["step"], saved["minutes"]
        return state

    def save(self, path: Path) -> None:
        weights = {name: getattr(self, name).state_dict() for name in ("transformer", "averaged", "optimizer")}
        save_state(weights | {"step": self.step, "minutes": self.minutes}, path)

    def update_average(self) -> None:
        """averaged <- decay * averaged + (1 - decay) * transformer, with a smaller decay in the first updates."""
        decay = min(EMA_DECAY, self.step / (self.step + 10))
        torch._foreach_lerp_(list(self.averaged.parameters()), list(self.transformer.parameters()), 1 - decay)

    @property
    def progress(self) -> dict:
        return {"step": self.step, "minutes": round(self.minutes, 2)}


def train_together(
    buffers: list[RolloutBuffer],
    sigmas: torch.Tensor,
    *,
    student_share: float,
    loss_scale: float,
    rng: np.random.Generator,
) -> dict[str, list[float]]:
    """Adds the gradients of the buffers' rows, in one forward pass, and moves the rows on.

    Args:
        sigmas: (K + 1,), the deployed schedule.
        student_share: probability that a row moves on by the student's step instead of the teacher's.
        loss_scale: multiplies the sum of the rows' losses.

    Returns:
        The mean loss of each kind of row in each of the K segments.
    """
    architecture, pipeline = buffers[0].architecture, buffers[0].source.pipeline
    rows = [buffer.next_rows(rng) for buffer in buffers]
    targets = torch.cat([buffer.targets(part) for buffer, part in zip(buffers, rows, strict=True)])
    states, context = torch.cat([part.states for part in rows]), architecture.join([part.context for part in rows])
    segments = torch.cat([buffer.segments for buffer in buffers])
    length = (sigmas[1:] - sigmas[:-1])[segments].view(-1, 1, 1, 1)
    # The backward pass of fused attention is slow in bfloat16 on a CPU.
    with autocast(), attention_backend("_native_math"):
        predicted = architecture.velocity(pipeline, states, sigmas[segments], context)
    loss = (predicted - (targets - states) / length).square().mean((1, 2, 3))
    (loss.sum() * loss_scale).backward()
    uses_student = torch.from_numpy(rng.random((len(segments), 1, 1, 1)) < student_share)
    next_states = torch.where(uses_student, states + length * predicted.detach(), targets)
    losses = {}
    sizes = [len(buffer.segments) for buffer in buffers]
    for buffer, part, values in zip(buffers, next_states.split(sizes), loss.detach().split(sizes), strict=True):
        buffer.store(part)
        losses[buffer.kind] = [values[buffer.segments == k].mean().item() for k in range(len(sigmas) - 1)]
    return losses


def update(
    state: TrainingState, groups: list[list[RolloutBuffer]], sigmas: torch.Tensor, settings: Settings
) -> dict[str, list[float]]:
    """Makes one update of the transformer and of its average. Returns the losses (see `train_together`)."""
    rng = np.random.default_rng([5, settings.seed, state.step])
    share = min(STUDENT_SHARE, state.step / settings.student_share_steps)
    num_rows = sum(len(buffer.segments) for buffers in groups for buffer in buffers)
    losses = {}
    for buffers in groups:
        losses |= train_together(buffers, sigmas, student_share=share, loss_scale=1 / num_rows, rng=rng)
    state.optimizer.step(trapezoid(state.step, settings.num_steps, warmup=50, decay_share=settings.decay_share))
    state.step += 1
    state.update_average()
    return losses


def distill(
    source: RowSource,
    teacher: PosteriorTeacher,
    sigmas: torch.Tensor,
    state_path: Path,
    settings: Settings,
    *,
    log: Callable[[dict], None],
    evaluate: Callable[[ModelMixin], dict],
    groups: list[list[RolloutBuffer]] | None = None,
    initial_weights: dict[str, torch.Tensor] | None = None,
) -> None:
    """Trains the transformer. Resumes from `state_path`.

    Args:
        sigmas: (K + 1,), the deployed schedule.
        groups: the rows to train on, grouped by what can share a forward pass. Default: `make_buffers`.
        initial_weights: of the transformer. Default: random ones.
        log: called with a dict of metrics.
        evaluate: returns metrics of a transformer; called with the averaged weights.
    """
    state = TrainingState.open(state_path, source.architecture, settings, initial_weights)
    source.pipeline.transformer = state.transformer
    if state.step >= settings.num_steps:
        log(state.progress | evaluate(state.averaged))
    groups = groups or make_buffers(source, teacher, sigmas, settings.rows_per_slot)
    started = time.monotonic() - 60 * state.minutes
    saved = evaluated = state.minutes
    losses = defaultdict(list)
    while state.step < settings.num_steps:
        for kind, values in update(state, groups, sigmas, settings).items():
            losses[f"loss_{kind}"].append(values)
        state.minutes = (time.monotonic() - started) / 60
        is_last = state.step == settings.num_steps
        if state.step % STEPS_PER_LOG == 0:
            log(state.progress | {name: np.mean(values, 0).round(4).tolist() for name, values in losses.items()})
            losses.clear()
        if is_last or state.minutes - evaluated > settings.minutes_per_evaluation:
            log(state.progress | evaluate(state.averaged))
            evaluated = state.minutes
        if is_last or state.minutes - saved > MINUTES_PER_SAVE:
            state.save(state_path)
            saved = state.minutes


def make_buffers(
    source: RowSource, teacher: PosteriorTeacher, sigmas: torch.Tensor, rows_per_slot: dict[str, int]
) -> list[list[RolloutBuffer]]:
    """One buffer per kind of row, grouped by what can share a forward pass: rows without and with references."""
    word_teacher = PosteriorTeacher(
        source.latents, sigmas, num_directions=UNKNOWN_DIRECTIONS, num_substeps=source.architecture.num_substeps
    )
    text, word, reference = (
        RolloutBuffer(kind, rows_per_slot[kind], source, word_teacher if kind == "word" else teacher)
        for kind in ROW_KINDS
    )
    return [[text, word], [reference]]
