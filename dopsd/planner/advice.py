"""Which flags make a run fit on a card. Each suggestion is planned, so its peak is computed."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ..settings import NO_QUANTIZATION, Settings
from .cards import Card
from .plan import Plan, Planner


MIN_RANK = 16

NUMBERS_OF_GPUS = (2, 4, 8, 16)

# Kind of quantization -> those that take less memory.
STRONGER = {None: ("int8", "nf4"), "int8": ("nf4",), "float8": ("nf4",), "nf4": ()}


@dataclass(frozen=True)
class Suggestion:
    """Flags to add, and the plan with them."""

    flags: str
    plan: Plan


@dataclass(frozen=True)
class Change:
    """A change of flags.

    Attributes:
        flags: as on the command line.
        values: flag -> value, as for `Settings.replace`.
        num_gpus: of the run; None if they stay as many.
    """

    flags: str
    values: dict[str, Any]
    num_gpus: int | None = None


# What lowers the memory of a phase, cheapest first


def precision_changes(settings: Settings) -> Iterator[Change]:
    if settings.training.mixed_precision == "no":
        yield Change("--mixed_precision bf16", {"mixed_precision": "bf16"})


def text_encoder_changes(settings: Settings) -> Iterator[Change]:
    for kind in STRONGER[settings.model.quantize_text_encoder]:
        yield Change(f"--quantize_text_encoder {kind}", {"quantize_text_encoder": kind})


def transformer_changes(settings: Settings) -> Iterator[Change]:
    """Other ways to keep the frozen transformer. A bitsandbytes file has to be dropped for any of them."""
    model, performance = settings.model, settings.performance
    if settings.full.is_full:
        yield from whole_model_changes(settings)
        return
    if model.bnb_quantization_config_path is not None:
        return
    if not performance.is_sharded:
        for kind in STRONGER[model.quantize]:
            yield Change(f"--quantize {kind}", {"quantize": kind})
    if not performance.offload_transformer:
        undone = "" if model.quantize is None else f"--quantize {NO_QUANTIZATION} "
        yield Change(f"{undone}--offload_transformer", {"quantize": None, "offload_transformer": True})


def whole_model_changes(settings: Settings) -> Iterator[Change]:
    """Other ways to keep weights that are trained, with their copies, gradients and optimizer states."""
    if settings.performance.offload_transformer:
        yield Change("--train_mode lora", {"train_mode": "lora"})
        return
    rounded, in_host = {"bf16_update": "stochastic_rounding"}, {"ema_device": "cpu"}
    flags = "--bf16_update stochastic_rounding"
    if settings.training.mixed_precision == "no":
        rounded, flags = rounded | {"mixed_precision": "bf16"}, f"--mixed_precision bf16 {flags}"
    if not settings.full.rounds_at_random:
        yield Change(flags, rounded)
    yield Change("--ema_device cpu", in_host)
    if not settings.full.rounds_at_random:
        yield Change(f"{flags} --ema_device cpu", rounded | in_host)
    for num_gpus in NUMBERS_OF_GPUS:
        yield Change("--fsdp", {"fsdp": True}, num_gpus)
    if not settings.performance.fsdp:
        yield Change("--offload_transformer", {"offload_transformer": True})
    yield Change("--train_mode lora", {"train_mode": "lora"})


def training_changes(settings: Settings) -> Iterator[Change]:
    """Those that leave the weights as they are and hardly change what is learned."""
    yield from precision_changes(settings)
    if settings.optimizer.optimizer == "adamw" and not settings.optimizer.use_8bit_adam:
        yield Change("--use_8bit_adam", {"use_8bit_adam": True})
    checkpointing = {"gradient_checkpointing": True}
    is_missing = not settings.performance.gradient_checkpointing
    if is_missing:
        yield Change("--gradient_checkpointing", checkpointing)
    if not settings.performance.offload_activations:
        added = "--gradient_checkpointing " if is_missing else ""
        yield Change(f"{added}--offload_activations", checkpointing | {"offload_activations": True})
    if settings.training.no_context_cache:
        yield from text_encoder_changes(settings)
    if (batch_size := settings.training.train_batch_size) > 1:
        accumulated = settings.training.gradient_accumulation_steps * batch_size
        yield Change(
            f"--train_batch_size 1 --gradient_accumulation_steps {accumulated}",
            {"train_batch_size": 1, "gradient_accumulation_steps": accumulated},
        )


def drawing_changes(settings: Settings) -> Iterator[Change]:
    validation = settings.validation
    half = {name: getattr(validation, name) // 32 * 16 for name in ("validation_height", "validation_width")}
    yield Change(" ".join(f"--{name} {value}" for name, value in half.items()), half)
    yield Change("--validation_steps 0", {"validation_steps": 0})


def sacrifices(settings: Settings) -> Iterator[Change]:
    """What lowers the memory of training further: less is learned."""
    for resolution in (768, 512):
        if settings.data.resolution > resolution:
            yield Change(f"--resolution {resolution}", {"resolution": resolution})
    rank = 0 if settings.full.is_full else settings.lora.rank
    while (rank := rank // 2) >= MIN_RANK:
        yield Change(f"--rank {rank}", {"rank": rank})


# Which of them are enough


def suggestions(planner: Planner, plan: Plan, card: Card) -> dict[str, list[Suggestion]]:
    """What makes each phase fit that does not, in the order of the run.

    Returns:
        "encoding" -> suggestions, and "training", or "drawing" if training fits. A phase that nothing makes fit has
        none; one that fits is not there.
    """
    too_large = {phase.name.partition(":")[0] for phase in plan.too_large(card)}
    found = {}
    if "encoding" in too_large:
        found["encoding"] = encoding_suggestions(planner, card)
    if "training" in too_large:
        found["training"] = training_suggestions(planner, card, "drawing" in too_large)
    elif "drawing" in too_large:
        found["drawing"] = training_suggestions(planner, card, True)
    return found


def encoding_suggestions(planner: Planner, card: Card) -> list[Suggestion]:
    """Single changes that make it fit; if there is none, the first of the list that do together."""
    settings = planner.settings
    changes = [*precision_changes(settings), *text_encoder_changes(settings)]
    search = Search(planner, card, is_encoding=True)
    return search.single(changes) or search.together([], changes)


def training_suggestions(planner: Planner, card: Card, draws_too: bool = False) -> list[Suggestion]:
    """The changes that make training and drawing fit, for each way to keep the transformer.

    Args:
        draws_too: whether drawing does not fit either.
    """
    settings, search = planner.settings, Search(planner, card, is_encoding=False)
    cheap = [*training_changes(settings), *(drawing_changes(settings) if draws_too else ())]
    ways = [way for way in transformer_changes(settings) if (way.num_gpus or math.inf) > planner.num_processes]
    found = search.single(cheap) or search.together([], cheap)
    enough: list[Change] = []
    for way in ways:
        # Several flags, or more GPUs, where fewer do not help.
        if any(other.values.items() <= way.values.items() for other in enough):
            continue
        rest = search.enough([way], cheap)
        # Of a whole model, a way that is not needed is no advice: it costs precision, time or cards.
        if rest is not None and not (settings.full.is_full and search.fits(rest)):
            enough.append(way)
            found.append(search.make([way, *rest]))
    if found:
        return found
    smallest = min(ways, key=lambda way: search.peak([way]), default=None)
    return search.together([] if smallest is None else [smallest], [*cheap, *sacrifices(settings)])


def merged(changes: Sequence[Change]) -> dict[str, Any]:
    """All values; of one flag, the last."""
    return {name: value for one in changes for name, value in one.values.items()}


@dataclass(frozen=True)
class Search:
    """Looks for changes that make encoding, or what comes after it, fit."""

    planner: Planner
    card: Card
    is_encoding: bool

    def single(self, changes: Sequence[Change]) -> list[Suggestion]:
        """Those that are enough, without those that set more flags than another one."""
        enough = [change for change in changes if self.fits([change])]
        return [
            self.make([change])
            for change in enough
            if not any(other.values.items() < change.values.items() for other in enough)
        ]

    def together(self, needed: list[Change], changes: Sequence[Change]) -> list[Suggestion]:
        """`needed` with `enough` of the changes; nothing if all of them are not."""
        rest = self.enough(needed, changes)
        return [] if rest is None else [self.make([*needed, *rest])]

    def enough(self, needed: list[Change], changes: Sequence[Change]) -> list[Change] | None:
        """As few changes as make it fit with `needed`, the cheapest ones; None if all of them do not."""
        chosen: list[Change] = []
        known = merged(needed).items()
        rest = iter([one for one in changes if not one.values.items() <= known])
        while not self.fits([*needed, *chosen]):
            if (change := next(rest, None)) is None:
                return None
            chosen = [*(one for one in chosen if not one.values.keys() & change.values.keys()), change]
        for change in reversed(chosen[:-1]):
            fewer = [one for one in chosen if one is not change]
            if self.fits([*needed, *fewer]):
                chosen = fewer
        return chosen

    def make(self, chosen: Sequence[Change]) -> Suggestion:
        flags, num_gpus = (
            " ".join(one.flags for one in chosen),
            next(filter(None, (one.num_gpus for one in chosen)), None),
        )
        if num_gpus is not None:
            flags += f" on {num_gpus} GPUs"
        return Suggestion(flags, self.planner.on(num_processes=num_gpus).plan(**merged(chosen)))

    def peak(self, chosen: Sequence[Change]) -> int:
        phases = self.make(chosen).plan.phases
        return max((one.peak for one in phases if one.name.startswith("encoding") == self.is_encoding), default=0)

    def fits(self, chosen: Sequence[Change]) -> bool:
        return self.peak(chosen) <= self.card.usable_bytes
