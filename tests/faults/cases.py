"""What a case of a fault is, and the list of all kinds of faults."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal


if TYPE_CHECKING:
    from .lab import Lab, Scene, Start


class Verdict(StrEnum):
    TRAINED = "trained"
    REFUSED = "refused"
    TRACEBACK = "tracebacks"
    DIFFERENT = "different weights"
    HANG = "hangs"

    @property
    def is_failure(self) -> bool:
        return self in (Verdict.TRACEBACK, Verdict.DIFFERENT, Verdict.HANG)


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
        before: runs first, with a function that starts the run; returns a failure, or None.
    """

    what: str
    model: str
    flags: dict[str, Any] = field(default_factory=dict)
    arguments: tuple[str, ...] = ()
    must: Literal["train", "refuse"] | None = None
    weights: Path | None = None
    saves_lora: bool = True
    payload: Path | None = None
    before: Callable[["Start"], tuple[Verdict, str] | None] | None = None


Kind = Callable[["Scene"], Case]

# Area -> kinds of faults, in the order of the area's file.
AREAS: dict[str, list[Kind]] = {}


def kind(function: Kind) -> Kind:
    """Adds a kind of fault to the area that its module is named after."""
    AREAS.setdefault(area_of(function), []).append(function)
    return function


def area_of(function: Kind) -> str:
    return function.__module__.rpartition(".")[2]


def all_kinds() -> list[Kind]:
    """All kinds. Each area's are spread evenly, so that the first cases are of every area."""
    places = [
        ((place + 0.5) / len(kinds), area, function)
        for area, kinds in AREAS.items()
        for place, function in enumerate(kinds)
    ]
    return [function for *_, function in sorted(places, key=lambda item: item[:2])]


def kind_of(number: int) -> Kind:
    """The kind of case `number`: all kinds take turns. Another kind, new in an area, moves the numbers of the rest."""
    kinds = all_kinds()
    return kinds[number % len(kinds)]


def name_of(function: Kind) -> str:
    return f"{area_of(function)}.{function.__name__}"


def make_case(lab: "Lab", seed: int, number: int, folder: Path) -> tuple[str, Case]:
    """The name of its kind, and case `number` of `seed`, with its input written to a new folder."""
    from .lab import Scene

    folder.mkdir(parents=True)
    function = kind_of(number)
    return name_of(function), function(Scene(random.Random(f"{seed}/{number}"), folder, lab))
