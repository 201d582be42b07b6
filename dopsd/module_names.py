"""The modules that a flag selects by their names."""

import re
from collections.abc import Sequence

from .errors import InputError


_REGULAR_EXPRESSION = re.compile(r"[\\*+?()\[\]{}|^$]")


def select_names(flag: str, selection: str, names: Sequence[str], noun: str) -> list[str]:
    """The names that a selection matches, in their order.

    Args:
        flag: with its value, for error messages.
        selection: names or endings of names, separated by commas ("to_q,to_k"), or a regular expression that matches
            whole names.
        noun: what has these names, in the singular.

    Raises:
        InputError: a name or the regular expression matches none.
    """
    hint = f"; some of the {noun}s are {', '.join(names[1:200:25])}"
    if _REGULAR_EXPRESSION.search(selection):
        try:
            expression = re.compile(selection)
        except re.error as error:
            raise InputError(f"{flag}: not a valid regular expression ({error})") from error
        matches = [name for name in names if expression.fullmatch(name)]
        if not matches:
            raise InputError(f"{flag}: the expression matches no {noun}{hint}")
        return matches

    matches = set()
    for ending in (part.strip() for part in selection.split(",")):
        found = {name for name in names if ending and (name == ending or name.endswith("." + ending))}
        if not found:
            raise InputError(f"{flag}: {ending!r} matches no {noun}{hint}")
        matches |= found
    return [name for name in names if name in matches]
