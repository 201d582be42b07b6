"""Applies a tokenizer's chat template, a program from the checkpoint: within a time, with one-line errors."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from dopsd.errors import InputError, one_line


MAX_SECONDS = 5.0  # of the processor
MAX_ADDED_CHARACTERS = 20_000
ADVICE = "use the tokenizer of the published checkpoint"


class _TooLong(Exception):
    """Raised by the alarm inside the template."""


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raises `_TooLong` in the block after that processor time, in the main thread of a system with alarms."""
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number, frame):
        raise _TooLong

    before = signal.signal(signal.SIGPROF, interrupt)
    try:
        signal.setitimer(signal.ITIMER_PROF, seconds)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
    finally:
        signal.signal(signal.SIGPROF, before)


@cache
def _refuse_products(template: str) -> None:
    # An alarm cannot interrupt the computation of a power, nor the repetition of a text.
    if any(kind == "operator" and text in ("*", "**") for _, kind, text in jinja2.Environment().lex(template)):
        raise ValueError("it multiplies, for which a chat has no use")


def apply_chat_template(tokenizer: PreTrainedTokenizerBase, content: str, **options: Any) -> str:
    """The chat text with one message of the user, up to the start of the answer.

    Transformers runs the template in jinja's sandbox, which forbids access to Python's internals, and long ranges, but
    not loops in loops.

    Args:
        options: passed to the template.

    Raises:
        InputError: there is no template, it fails, takes too long, drops the message or adds too much to it.
    """
    try:
        _refuse_products(tokenizer.get_chat_template())
        with _time_limit(MAX_SECONDS):
            text = tokenizer.apply_chat_template(
                [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True, **options
            )
    except _TooLong:
        problem, cause = f"takes more than {MAX_SECONDS:g} s", None
    except Exception as error:  # A template can raise anything.
        problem, cause = f"cannot be applied ({one_line(error)[:180] or type(error).__name__})", error
    else:
        if content.strip() not in text:
            problem, cause = "drops the message", None
        elif len(text) > len(content) + MAX_ADDED_CHARACTERS:
            problem, cause = f"adds {len(text) - len(content):,} characters", None
        else:
            return text
    raise InputError(f"the tokenizer's chat template {problem}; {ADVICE}") from cause
