"""The types of flags: a dataclass field per flag, with its range and whether a resumed run must keep it."""

import math
from dataclasses import dataclass, field, fields
from typing import Annotated, Any, TypeVar, get_args, get_type_hints

from .errors import InputError


T = TypeVar("T")
MUST_MATCH, MAY_DIFFER = "must match on resuming", "may differ on resuming"
MustMatch = Annotated[T, MUST_MATCH]
MayDiffer = Annotated[T, MAY_DIFFER]


@dataclass(frozen=True)
class Range:
    """Numbers that a flag accepts.

    Attributes:
        description: completes "must be ..." in the error.
        low, high: the bounds; NaN and infinity are in no range.
        open_low, open_high: whether the bound itself is excluded.
    """

    description: str
    low: float
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False

    def __contains__(self, value: float) -> bool:
        above = value > self.low if self.open_low else value >= self.low
        below = value < self.high if self.open_high else value <= self.high
        return above and below and math.isfinite(value)


Count = Annotated[int, Range("a whole number of at least 1", 1)]
# Every repetition is an example of its own in memory.
Repeats = Annotated[int, Range("a whole number from 1 to 10000", 1, 10_000)]
CountOrZero = Annotated[int, Range("a whole number of at least 0", 0)]
Seed = Annotated[int, Range("a whole number from 0 to 4294967295", 0, 2**32 - 1)]
Positive = Annotated[float, Range("a number above 0", 0, open_low=True)]
NotNegative = Annotated[float, Range("a number of at least 0", 0)]
Fraction = Annotated[float, Range("a number from 0 to 1", 0, 1)]
BelowOne = Annotated[float, Range("a number of at least 0 and below 1", 0, 1, open_high=True)]


def flag(default: Any, help: str) -> Any:
    """A field with its default and its line in `--help`."""
    metadata = {"help": help.replace("%", "%%")}
    if isinstance(default, (list, tuple)):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def annotations(group: type) -> dict[str, list[Any]]:
    """Field name -> markers in its type: `MUST_MATCH` or `MAY_DIFFER`, and a `Range` if there is one."""
    hints = get_type_hints(group, include_extras=True)
    return {item.name: _markers(hints[item.name]) for item in fields(group)}


def _markers(hint: Any) -> list[Any]:
    found = list(getattr(hint, "__metadata__", ()))
    for part in get_args(hint):
        found += _markers(part)
    return found


def check_ranges(group: Any) -> None:
    """Raises `InputError` for a number outside the range in its field's type."""
    for name, markers in annotations(type(group)).items():
        value = getattr(group, name)
        for marker in markers:
            for number in value if isinstance(value, list) else [value]:
                if isinstance(marker, Range) and number is not None and number not in marker:
                    raise InputError(f"--{name} {number}: must be {marker.description}")
