"""What a case of a fault is, and the list of all kinds of faults."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal


if TYPE_CHECKING:
    from .lab import Lab, Scene, Start


@dataclass(frozen=True)
class Case:
    """A run on damaged input, and what it may do.

    Attributes:
        what: the damage, for the report.
        model: name of the subject, see `lab.SUBJECTS`.
        flags: changes to the flags of a short run, see `short_runs.as_arguments`.
        arguments: further arguments, at the end of the command line.
        must: "train" if a refusal would be wrong, "refuse" if training would be. By default, both are right.
        weights: folder with the LoRA that the run must end with if it trains. By default, it must only be finite.
        saves_lora: False if the run may end without a LoRA.
        payload: file that exists only if the run executed code from its input.
        before: runs first, with a function that starts the run; returns a problem or None.
    """

    what: str
    model: str
    flags: dict[str, Any] = field(default_factory=dict)
    arguments: tuple[str, ...] = ()
    must: Literal["train", "refuse"] | None = None
    weights: Path | None = None
    saves_lora: bool = True
    payload: Path | None = None
    before: Callable[["Start"], str | None] | None = None


Kind = Callable[["Scene"], Case]

# Area -> kinds of faults, in the order of the area's file.
AREAS: dict[str, list[Kind]] = {}


def kind(function: Kind) -> Kind:
    """Adds a kind of fault to the area that its module is named after."""
    AREAS.setdefault(area_of(function), []).append(function)
    return function


def area_of(function: Kind) -> str:
    return function.__module__.rpartition(".")[2]


def kind_of(number: int) -> Kind:
    """The kind of case `number`: areas take turns, and the kinds of an area take turns."""
    areas = [AREAS[name] for name in sorted(AREAS)]
    kinds = areas[number % len(areas)]
    return kinds[number // len(areas) % len(kinds)]


def name_of(function: Kind) -> str:
    return f"{area_of(function)}.{function.__name__}"


def make_case(lab: "Lab", seed: int, number: int, folder: Path) -> tuple[str, Case]:
    """The name of its kind, and case `number` of `seed`, with its input written to a new folder."""
    from .lab import Scene

    folder.mkdir(parents=True)
    function = kind_of(number)
    return name_of(function), function(Scene(random.Random(f"{seed}/{number}"), folder, lab))
