"""The plan as text."""

from collections.abc import Iterator, Mapping, Sequence

from ..contexts import in_units
from .advice import Suggestion
from .cards import RESERVED_BYTES, RESERVED_SHARE, Card
from .plan import HOST_BYTES_PER_SECOND, UTILIZATION, Plan


def report(plan: Plan, card: Card | None, found: Mapping[str, Sequence[Suggestion]], model_name: str) -> str:
    return "\n".join([*_lines(plan, card, found, model_name)])


def _lines(plan: Plan, card: Card | None, found: Mapping[str, Sequence[Suggestion]], model_name: str) -> Iterator[str]:
    place = "this machine's CPU" if card is None else f"{card.name}, {card.memory_gb:.0f} GB"
    height, width = plan.batch.size
    pictures = "picture" if plan.batch.count == 1 else "pictures"
    yield f"Plan of {model_name} from {plan.settings.model.pretrained_model_name_or_path}, on {place}; computed"
    yield f"Largest batch: {plan.batch.count} {pictures} of {height}x{width} pixels (height x width)"
    yield ""
    yield f"{'GB':<24}{'peak':>6}"
    for phase in plan.phases:
        parts = "; ".join(f"{name} {size / 1e9:.2f}" for name, size in phase.parts.items())
        yield f"{phase.name:<24}{phase.peak / 1e9:>6.1f}   {parts}"
    if card is not None:
        yield f"{'host memory':<24}{plan.host / 1e9:>6.1f}"
    yield ""
    if not plan.settings.training.encode_only:
        yield from _time(plan, card)
    yield _disk(plan)
    if card is not None:
        yield from _verdict(plan, card, found)


def _time(plan: Plan, card: Card | None) -> Iterator[str]:
    yield f"A step: {plan.mean_flops / 1e12:.4g} TFLOP on average, at most {plan.max_flops / 1e12:.4g}"
    if card is not None and plan.moved:
        when = "while it computes" if plan.overlaps else "added to the time that it computes"
        where = "between host memory and the card" if plan.settings.full.is_full else "to the card"
        yield (
            f"Weights that a step moves {where}: {plan.moved / 1e9:.4g} GB, {plan.moving_seconds:.3g} s at "
            f"{HOST_BYTES_PER_SECOND / 1e9:.0f} GB/s (PCIe 4.0 x16), {when}"
        )
    seconds = None if card is None else plan.seconds_per_step(card)
    if seconds is not None:
        yield (
            f"At {UTILIZATION:.0%} of {card.tflops:.4g} TFLOP/s: {seconds:.3g} s per step, "
            f"{seconds * plan.num_steps / 3600:.3g} hours for {plan.num_steps} steps"
        )


def _disk(plan: Plan) -> str:
    parts = [f"context cache {in_units(plan.cache)}"]
    if not plan.settings.training.encode_only:
        kept = "" if plan.num_checkpoints == 1 else "s"
        parts += [
            f"{plan.num_checkpoints} checkpoint{kept} of {in_units(plan.checkpoint)}",
            f"{'transformer' if plan.settings.full.is_full else 'LoRA'} {in_units(plan.product)}",
        ]
    return f"Disk: {', '.join(parts)}"


def _verdict(plan: Plan, card: Card, found: Mapping[str, Sequence[Suggestion]]) -> Iterator[str]:
    reserve = (
        f"of {card.memory_gb:.0f} GB, {card.usable_bytes / 1e9:.1f} are for the run; {RESERVED_BYTES / 1e9:.1f} GB "
        f"and {RESERVED_SHARE:.0%} are left to CUDA and to gaps"
    )
    too_large = [phase.name for phase in plan.too_large(card)]
    if not too_large:
        yield f"It fits: {reserve}"
        return
    yield f"It does not fit ({', '.join(too_large)}): {reserve}"
    for part, ways in found.items():
        yield f"{part.capitalize()} fits with one of:" if ways else f"No flags make {part} fit; take a larger card"
        for way in ways:
            sizes = {phase.name: phase.peak for phase in way.plan.phases if _belongs(phase.name, part)}
            yield f"  {way.flags}   " + ", ".join(
                f"{name} {size / 1e9:.1f} GB" for name, size in sizes.items() if name in too_large
            )
        if part == "encoding":
            yield "Or encode on a larger card or a CPU: the same flags with --encode_only; train here from its cache"


def _belongs(phase: str, part: str) -> bool:
    return phase.startswith("encoding") == (part == "encoding")
