"""Errors that end a run with one line. Everything else is a bug and keeps its traceback."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .text import printable


# What PyTorch raises when a GPU fails or runs out of memory. Both are RuntimeErrors; AcceleratorError came after 2.6.
DEVICE_ERRORS = tuple(
    getattr(torch, name) for name in ("OutOfMemoryError", "AcceleratorError") if hasattr(torch, name)
)


MAX_INPUT_ERROR_CHARACTERS = 390


class DOPSDError(Exception):
    """Base class. The message is one printable line that says what happened and what to do."""

    def __init__(self, message: str):
        super().__init__(printable(message))


class InputError(DOPSDError, ValueError):
    """A flag, a file or a checkpoint cannot be used. The message names it.

    A message that is too long loses its middle, since what users name files may have any length.
    """

    def __init__(self, message: str):
        message = printable(message)
        if len(message) > MAX_INPUT_ERROR_CHARACTERS:
            half = MAX_INPUT_ERROR_CHARACTERS // 2 - 3
            message = f"{message[:half]} ... {message[-half:]}"
        super().__init__(message)


class OutputError(DOPSDError):
    """A result cannot be written. The message says what is already safe on disk."""


class TrainingDiverged(DOPSDError):
    """The loss or the gradients are not finite. Raised before the optimizer changes any weight."""


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
