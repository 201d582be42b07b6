"""Errors that end a run with one line. Everything else is a bug and keeps its traceback."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from .text import printable


class DOPSDError(Exception):
    """Base class. The message is one printable line that says what happened and what to do."""

    def __init__(self, message: str):
        super().__init__(printable(message))


class InputError(DOPSDError, ValueError):
    """A flag, a file or a checkpoint cannot be used. The message names it."""


class OutputError(DOPSDError):
    """A result cannot be written. The message says what is already safe on disk."""


class TrainingDiverged(DOPSDError):
    """The loss or the gradients are not finite. Raised before the optimizer changes any weight."""


def device_errors() -> tuple[type[Exception], ...]:
    """What PyTorch raises when a GPU fails or runs out of memory; nothing before torch is imported.

    Both are RuntimeErrors; AcceleratorError came after torch 2.6.
    """
    torch = sys.modules.get("torch")
    return tuple(getattr(torch, name) for name in ("OutOfMemoryError", "AcceleratorError") if hasattr(torch, name))


def first_line(error: Exception) -> str:
    """The first line of the error's message, or its type if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def one_line(error: Exception) -> str:
    """The whole message of the error, on one line."""
    return " ".join(str(error).split())


@contextmanager
def naming_flag(flag: str) -> Iterator[None]:
    """Puts `flag` before the message of an `InputError` from code that knows nothing of flags."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{flag} {error}") from error
