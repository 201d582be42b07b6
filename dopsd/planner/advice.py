"""Which flags make a run fit on a card. Each suggestion is planned, so its peak is computed."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..settings import Settings
from .cards import Card
from .plan import Plan, Planner


MIN_RANK = 16


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
    """

    flags: str
    values: dict[str, Any]


def changes(settings: Settings) -> Iterator[Change]:
    """What lowers the memory of training without changing what is learned much, cheapest first."""
    has = settings.flat().get
    if has("mixed_precision") == "no":
        yield Change("--mixed_precision bf16", {"mixed_precision": "bf16"})
    if has("optimizer") == "adamw" and not has("use_8bit_adam"):
        yield Change("--use_8bit_adam", {"use_8bit_adam": True})
    if not has("gradient_checkpointing"):
        yield Change("--gradient_checkpointing", {"gradient_checkpointing": True})
    is_quantized = has("quantize") or has("bnb_quantization_config_path")
    if not is_quantized and not settings.performance.is_sharded:
        for kind in ("int8", "nf4"):
            yield Change(f"--quantize {kind}", {"quantize": kind})
    if not has("offload_activations"):
        values = {"gradient_checkpointing": True, "offload_activations": True}
        yield Change("--gradient_checkpointing --offload_activations", values)
    if (batch_size := settings.training.train_batch_size) > 1:
        accumulated = settings.training.gradient_accumulation_steps * batch_size
        yield Change(
            f"--train_batch_size 1 --gradient_accumulation_steps {accumulated}",
            {"train_batch_size": 1, "gradient_accumulation_steps": accumulated},
        )
    if not has("offload_transformer") and not is_quantized:
        yield Change("--offload_transformer", {"offload_transformer": True})


def sacrifices(settings: Settings) -> Iterator[Change]:
    """What lowers the memory of training further: the LoRA learns less."""
    for resolution in (768, 512):
        if settings.data.resolution > resolution:
            yield Change(f"--resolution {resolution}", {"resolution": resolution})
    rank = settings.lora.rank
    while (rank := rank // 2) >= MIN_RANK:
        yield Change(f"--rank {rank}", {"rank": rank})


def suggestions(planner: Planner, plan: Plan, card: Card) -> list[Suggestion]:
    """What makes each phase fit that does not, in the order of the run."""
    too_large = {phase.name for phase in plan.too_large(card)}
    found = []
    if "encoding: text encoder" in too_large:
        found += text_encoder_suggestions(planner, card)
    if "training" in too_large:
        found += training_suggestions(planner, card)
    elif "drawing" in too_large:
        found += [make(planner, change) for change in drawing_changes(plan)]
        found = [one for one in found if fits(one.plan, card, "drawing")]
    return found


def text_encoder_suggestions(planner: Planner, card: Card) -> list[Suggestion]:
    kinds = ("int8", "nf4") if planner.run.settings.model.quantize_text_encoder is None else ()
    changes = [Change(f"--quantize_text_encoder {kind}", {"quantize_text_encoder": kind}) for kind in kinds]
    return [one for one in (make(planner, change) for change in changes) if fits(one.plan, card, "encoding")]


def drawing_changes(plan: Plan) -> Iterator[Change]:
    validation = plan.settings.validation
    half = {name: getattr(validation, name) // 32 * 16 for name in ("validation_height", "validation_width")}
    yield Change(" ".join(f"--{name} {value}" for name, value in half.items()), half)
    yield Change("--validation_steps 0", {"validation_steps": 0})


def training_suggestions(planner: Planner, card: Card) -> list[Suggestion]:
    """Single changes that make training fit; if there is none, the first of the list that do together."""
    possible = list(changes(planner.run.settings))
    single = [make(planner, change) for change in possible]
    if fitting := [one for one in single if fits(one.plan, card, "training")]:
        return fitting
    chosen: list[Change] = []
    for change in [*possible, *sacrifices(planner.run.settings)]:
        chosen = [*(one for one in chosen if not excludes(change, one)), change]
        if fits(make(planner, *chosen).plan, card, "training"):
            return [fewest(planner, card, chosen)]
    return []


def excludes(later: Change, earlier: Change) -> bool:
    """Whether they set the same flag. Quantized weights cannot be offloaded."""
    common = later.values.keys() & earlier.values.keys() - {"gradient_checkpointing"}
    return bool(common) or ("offload_transformer" in later.values and "quantize" in earlier.values)


def fewest(planner: Planner, card: Card, chosen: list[Change]) -> Suggestion:
    """Leaves out what is not needed, the most expensive first."""
    for change in reversed(chosen[:-1]):
        rest = [one for one in chosen if one is not change]
        if fits(make(planner, *rest).plan, card, "training"):
            chosen = rest
    return make(planner, *chosen)


def make(planner: Planner, *chosen: Change) -> Suggestion:
    values = {name: value for one in chosen for name, value in one.values.items()}
    return Suggestion(" ".join(one.flags for one in chosen), planner.plan(**values))


def fits(plan: Plan, card: Card, phase: str) -> bool:
    """Whether the phases whose names begin so fit."""
    return not [one for one in plan.too_large(card) if one.name.startswith(phase)]
