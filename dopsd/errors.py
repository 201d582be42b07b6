"""Errors that end a run with one line. Everything else is a bug and keeps its traceback."""


class DOPSDError(Exception):
    """Base class. The message is one line that says what happened and what to do."""


class InputError(DOPSDError, ValueError):
    """A flag, a file or a checkpoint cannot be used. The message names it."""


class OutputError(DOPSDError):
    """A result cannot be written. The message says what is already safe on disk."""


class TrainingDiverged(DOPSDError):
    """The loss or the gradient is not finite. Raised before the optimizer changes any weight."""
