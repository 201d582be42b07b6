"""Distils the closed-form teacher into the miniature's transformer: average velocities over the deployed steps.

The student learns v = (x_{k+1} - x_k) / (sigma_{k+1} - sigma_k) of the teacher's ODE from sigma_k to sigma_{k+1}, at
first at the teacher's states, then mostly at those that its own steps lead to: the teacher answers anywhere.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers.models.attention_dispatch import attention_backend

import world
from optimizer import MuonAdamW, trapezoid
from parts import MAX_SEQUENCE_LENGTH, autocast, load_or_none, make_transformer, save_state
from pipelines.flux2_klein import Flux2KleinDOPSDPipeline, KleinContext
from teacher import LatentWorld, PosteriorTeacher
from vae import encode, to_tensor


EMA_DECAY = 0.998
# Segments of a conveyor's slots. The first four walk a whole trajectory; the others start at the teacher's state of
# segment 1, since the first step only prepares what the others decide.
SLOTS = (0, 1, 2, 3, 1, 2, 3)
STARTS = (0, 4)  # the slots that new rows enter
# The student's share of the steps along a conveyor grows to this over so many updates; the teacher makes the others.
# At its own states the student must decide what it left undecided; nothing else gives objects clean edges.
STUDENT_SHARE, STUDENT_SHARE_STEPS = 0.9, 600
# Of the reference rows: those whose words describe another object than the picture shows, where the words count; those
# of objects that words can describe, and of these the described ones. The suffix stands where the picture counts.
CONFLICT_SHARE, NAMED_SHARE, DESCRIBED_SHARE, SUFFIX_SHARE = 0.3, 0.15, 0.4, 0.75
# Of the captions that describe: those with a word without meaning before the others, which changes nothing.
EXTRA_WORD_SHARE = 0.25
# What a word without meaning stands for, in any shape and colour, where no reference tells. More directions than one
# are needed to tell such different pictures apart (see `PosteriorTeacher`).
UNKNOWN_TEXTURE, UNKNOWN_DIRECTIONS = "plain", 4
MINUTES_PER_SAVE = 4
STEPS_PER_LOG = 50


@dataclass
class Rows:
    """Captions and what they allow, B of them.

    Attributes:
        embeds: (B, L, D), the captions' encodings.
        means: (B, M, 8, 8, 64), latents of the pictures allowed, without grain.
        references: (B, 8, 8, 64), latents, or None.
        states: (B, 8, 8, 64), x at the start of the rows' segments.
    """

    embeds: torch.Tensor
    means: torch.Tensor
    references: torch.Tensor | None
    states: torch.Tensor

    @classmethod
    def cat(cls, parts: list["Rows"]) -> "Rows":
        columns = zip(*(vars(part).values() for part in parts), strict=True)
        return cls(*(None if column[0] is None else torch.cat(column) for column in columns))


class RowSource:
    """Draws captions with the latents they allow.

    Args:
        pipeline: its text encoder reads the captions, its VAE the references.
        sprites: (N, 40, 40, 4), those of `appearances` first, then objects without a name.
        latent_world: their scenes.
        appearances: the objects with a name that may be shown.
    """

    def __init__(
        self,
        pipeline: Flux2KleinDOPSDPipeline,
        sprites: np.ndarray,
        latent_world: LatentWorld,
        appearances: list[world.Appearance],
    ):
        self.pipeline, self.sprites, self.latents, self.appearances = pipeline, sprites, latent_world, appearances
        is_named = latent_world.objects < len(appearances)
        self.named, self.unnamed = is_named.nonzero()[:, 0].numpy(), (~is_named).nonzero()[:, 0].numpy()
        is_unknown = torch.tensor([item.texture == UNKNOWN_TEXTURE for item in appearances])
        unknown = self.named[is_unknown[latent_world.objects[self.named]].numpy()]
        # For each background, the scenes that a word without meaning allows.
        self.unknown = [unknown[latent_world.backgrounds[unknown] == index] for index in range(len(world.BACKGROUNDS))]

    def draw(self, kind: str, count: int, random: np.random.Generator) -> Rows:
        """New rows at sigma = 1.

        Args:
            kind: "text": an object's words. "word": a word without meaning (`UNKNOWN_TEXTURE`).
                "reference": a picture, of the object in another place or, where words describe the object, of
                another one (`CONFLICT_SHARE`).
        """
        names = list(world.BACKGROUNDS)
        is_conflict = random.random(count) < (CONFLICT_SHARE if kind == "reference" else 0)
        is_named = is_conflict | (random.random(count) < (NAMED_SHARE if kind == "reference" else 1))
        scenes = np.where(is_named, random.choice(self.named, count), random.choice(self.unnamed, count))
        objects, backgrounds = self.latents.objects[scenes].tolist(), self.latents.backgrounds[scenes].tolist()
        shown = np.where(is_conflict, random.integers(len(self.sprites), size=count), objects).tolist()
        is_described = is_conflict | (is_named & (random.random(count) < DESCRIBED_SHARE))
        captions = []
        for row, index in enumerate(objects):
            words = world.nonsense_word(random)
            if kind == "text" or (kind == "reference" and is_described[row]):
                extra = f"{words} " if random.random() < EXTRA_WORD_SHARE else ""
                words = extra + self.appearances[index].words
            has_suffix = kind == "reference" and not is_conflict[row] and random.random() < SUFFIX_SHARE
            suffix = world.REFERENCE_SUFFIX if has_suffix else ""
            captions.append(world.caption(words, names[backgrounds[row]]) + suffix)
        if kind == "word":
            allowed = np.stack([self.unknown[background] for background in backgrounds])
            means = self.latents.means[allowed].flatten(1, 2)
        else:
            means = self.latents.means[scenes]
        generator = torch.Generator().manual_seed(int(random.integers(2**62)))
        return Rows(
            embeds=self.pipeline.encode_student(captions, max_sequence_length=MAX_SEQUENCE_LENGTH).prompt_embeds,
            means=means.float(),
            references=self._references(shown, random) if kind == "reference" else None,
            states=torch.randn(count, *means.shape[2:], generator=generator),
        )

    def _references(self, objects: list[int], random: np.random.Generator) -> torch.Tensor:
        """(B, 8, 8, 64): pictures of the objects on any background at any pose, with grain."""
        pictures = [
            world.draw(
                self.sprites[index],
                world.POSES[random.integers(len(world.POSES))],
                random.choice(list(world.BACKGROUNDS)),
                random,
            )
            for index in objects
        ]
        return encode(self.pipeline.vae, to_tensor(np.stack(pictures)))


def velocity(
    pipeline: Flux2KleinDOPSDPipeline,
    states: torch.Tensor,
    sigmas: torch.Tensor,
    embeds: torch.Tensor,
    references: torch.Tensor | None,
) -> torch.Tensor:
    """(B, 8, 8, 64), float32: the pipeline's velocity at states (B, 8, 8, 64), each at its own sigma (B,)."""
    grids = () if references is None else (references.permute(0, 3, 1, 2),)
    context = KleinContext(embeds, grids)
    return pipeline.predict_velocity(states.permute(0, 3, 1, 2), 1000 * sigmas, context).permute(0, 2, 3, 1).float()


class Conveyor:
    """Rows of one kind, at all segments at once; each update they move one segment on.

    Args:
        kind: see `RowSource.draw`.
        per_slot: rows in each of `SLOTS`.
    """

    def __init__(self, kind: str, per_slot: int, source: RowSource, teacher: PosteriorTeacher):
        self.kind, self.per_slot, self.source, self.teacher = kind, per_slot, source, teacher
        self.segments = torch.tensor(SLOTS).repeat_interleave(per_slot)
        self.slots: list[Rows] = []

    def load(self, random: np.random.Generator) -> Rows:
        """The rows to train on, at `segments`. The first call fills every slot with the teacher's states."""
        self.slots = [
            self._start(segment, random) if slot in STARTS or not self.slots else self.slots[slot - 1]
            for slot, segment in enumerate(SLOTS)
        ]
        return Rows.cat(self.slots)

    def unload(self, states: torch.Tensor) -> None:
        """The states at the end of the segments, which the next call of `load` goes on from."""
        for rows, part in zip(self.slots, states.chunk(len(SLOTS)), strict=True):
            rows.states = part

    def answer(self, rows: Rows) -> torch.Tensor:
        """Where the teacher's ODE leads from the rows' states by the end of their segments."""
        return self.teacher.advance(rows.states, self.segments, rows.means)

    def _start(self, segment: int, random: np.random.Generator) -> Rows:
        rows = self.source.draw(self.kind, self.per_slot, random)
        for index in range(segment):
            rows.states = self.teacher.advance(rows.states, torch.full((self.per_slot,), index), rows.means)
        return rows


@dataclass(frozen=True)
class Settings:
    """Of the distillation.

    Attributes:
        per_slot: rows of each kind in each of `SLOTS`.
        muon_lr, adamw_lr: peaks.
        num_steps: updates; the learning rate falls over the last fifth.
        minutes_per_evaluation: wall-clock.
        seed: of the first weights and of the rows.
    """

    per_slot: dict[str, int]
    muon_lr: float
    adamw_lr: float
    num_steps: int
    minutes_per_evaluation: float
    seed: int


def train_together(
    conveyors: list[Conveyor],
    sigmas: torch.Tensor,
    *,
    student_share: float,
    loss_scale: float,
    random: np.random.Generator,
) -> dict[str, list[float]]:
    """Adds the gradients of conveyors' rows, in one forward, and moves the rows on.

    Returns:
        The mean loss of each kind in each segment.
    """
    rows = [conveyor.load(random) for conveyor in conveyors]
    answers = torch.cat([conveyor.answer(part) for conveyor, part in zip(conveyors, rows, strict=True)])
    states, embeds = torch.cat([part.states for part in rows]), torch.cat([part.embeds for part in rows])
    segments = torch.cat([conveyor.segments for conveyor in conveyors])
    length = (sigmas[1:] - sigmas[:-1])[segments].view(-1, 1, 1, 1)
    # The fused attention's backward is slow in bfloat16 on a CPU.
    with autocast(), attention_backend("_native_math"):
        predicted = velocity(conveyors[0].source.pipeline, states, sigmas[segments], embeds, rows[0].references)
    loss = (predicted - (answers - states) / length).square().mean((1, 2, 3))
    (loss.sum() * loss_scale).backward()
    is_own = torch.from_numpy(random.random((len(segments), 1, 1, 1)) < student_share)
    arrived = torch.where(is_own, states + length * predicted.detach(), answers)
    losses = {}
    sizes = [len(conveyor.segments) for conveyor in conveyors]
    for conveyor, part, values in zip(conveyors, arrived.split(sizes), loss.detach().split(sizes), strict=True):
        conveyor.unload(part)
        losses[conveyor.kind] = [values[conveyor.segments == k].mean().item() for k in range(len(sigmas) - 1)]
    return losses


def distill(
    source: RowSource,
    teacher: PosteriorTeacher,
    sigmas: torch.Tensor,
    state_path: Path,
    settings: Settings,
    *,
    log: Callable,
    evaluate: Callable,
) -> None:
    """Trains the transformer; resumes from `state_path`.

    Args:
        sigmas: (K + 1,), the deployed schedule.
        log: takes a dict of figures.
        evaluate: takes the transformer with the average of its weights, returns a dict of figures.
    """
    torch.manual_seed(settings.seed)
    transformer = make_transformer()
    averaged = make_transformer().eval().requires_grad_(False)
    averaged.load_state_dict(transformer.state_dict())
    optimizer = MuonAdamW(transformer, muon_lr=settings.muon_lr, adamw_lr=settings.adamw_lr)
    step, minutes = 0, 0.0
    if state := load_or_none(state_path):
        transformer.load_state_dict(state["transformer"])
        averaged.load_state_dict(state["averaged"])
        optimizer.load_state_dict(state["optimizer"])
        step, minutes = state["step"], state["minutes"]
    if step >= settings.num_steps:
        log({"step": step, "minutes": round(minutes, 2), **evaluate(averaged)})
    source.pipeline.transformer = transformer
    word_teacher = PosteriorTeacher(source.latents, sigmas, num_directions=UNKNOWN_DIRECTIONS)
    text, word, reference = (
        Conveyor(kind, settings.per_slot[kind], source, word_teacher if kind == "word" else teacher)
        for kind in ("text", "word", "reference")
    )
    groups = [[text, word], [reference]]
    num_rows = len(SLOTS) * sum(settings.per_slot.values())
    started, saved, evaluated = time.monotonic() - 60 * minutes, minutes, minutes
    losses = {kind: [] for kind in settings.per_slot}
    while step < settings.num_steps:
        random = np.random.default_rng([5, settings.seed, step])
        share = min(STUDENT_SHARE, step / STUDENT_SHARE_STEPS)
        for group in groups:
            figures = train_together(group, sigmas, student_share=share, loss_scale=1 / num_rows, random=random)
            for kind, values in figures.items():
                losses[kind].append(values)
        optimizer.step(trapezoid(step, settings.num_steps, warmup=50, decay_share=0.2))
        step += 1
        weight = 1 - min(EMA_DECAY, step / (step + 10))
        torch._foreach_lerp_(list(averaged.parameters()), list(transformer.parameters()), weight)
        minutes = (time.monotonic() - started) / 60
        if step % STEPS_PER_LOG == 0:
            means = {f"loss_{kind}": np.mean(values, 0).round(4).tolist() for kind, values in losses.items()}
            log({"step": step, "minutes": round(minutes, 2), **means})
            losses = {kind: [] for kind in losses}
        if minutes - evaluated > settings.minutes_per_evaluation or step == settings.num_steps:
            log({"step": step, "minutes": round(minutes, 2), **evaluate(averaged)})
            source.pipeline.transformer = transformer
            evaluated = minutes
        if minutes - saved > MINUTES_PER_SAVE or step == settings.num_steps:
            state = {"transformer": transformer.state_dict(), "averaged": averaged.state_dict()}
            save_state(state | {"optimizer": optimizer.state_dict(), "step": step, "minutes": minutes}, state_path)
            saved = minutes
