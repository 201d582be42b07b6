"""What the miniature's commands share: the parser, flag types and one-line errors."""

import argparse
import sys
from collections.abc import Callable

from dopsd.command_line import DefaultsHelpFormatter
from dopsd.errors import DOPSDError


class HelpFormatter(DefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, and keeps the line breaks of the description."""


def positive_int(text: str) -> int:
    """An argparse type: a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def run(main: Callable[[], None]) -> None:
    """Runs a command's `main`; a `DOPSDError` ends the process with one line and exit status 1."""
    try:
        main()
    except DOPSDError as error:
        sys.exit(str(error))
