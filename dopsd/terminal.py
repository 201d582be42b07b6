"""What a script prints: streams that survive their reader, no secrets, and errors in one line."""

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import TextIO

from .errors import DOPSDError, InputError, device_errors, first_line
from .text import printable


# Tokens of the Hugging Face Hub, and other services' keys as they appear in URLs and headers. A folder name such as
# hf_home is not a token.
TOKEN = re.compile(
    r"(?<![\w-])(hf_[A-Za-z0-9]{8,}|sk-[A-Za-z0-9_-]{20,}|gh[pousr]_[A-Za-z0-9]{8,}|github_pat_\w{20,})(?![\w/-])"
    r"|(?<=[Bb]earer )\S+"
)
MAX_REFUSAL_CHARACTERS = 360
LESS_MEMORY = "pass --gradient_checkpointing and --use_8bit_adam, or lower --resolution, --train_batch_size or --rank"
KEPT = "finished encodings are kept in the context cache"


def without_tokens(text: str) -> str:
    """The text with `[token]` in the place of everything that looks like an access token."""
    return TOKEN.sub("[token]", text)


def as_line(message: str, max_characters: int | None = None) -> str:
    """A message as one line of printable characters, without tokens, cut in the middle if it is too long."""
    text = printable(re.sub(r"\s*[\r\n]\s*", " ", without_tokens(message).strip()))
    if max_characters is not None and len(text) > max_characters:
        half = max_characters // 2 - 3
        text = f"{text[:half]} ... {text[-half:]}"
    return text


@contextmanager
def ending_in_one_line(script: str, *, less_memory: str = LESS_MEMORY, kept: str = KEPT) -> Iterator[None]:
    """A `DOPSDError` ends the process with one line and a non-zero exit status. Bugs keep their traceback.

    Args:
        script: path of the script.
        less_memory: what to do if the GPU's memory is full.
        kept: what an interrupted run leaves.
    """
    name = Path(script).name
    try:
        yield
    except DOPSDError as error:
        # Flags and files may have any length. Where a result is safe must not be cut.
        limit = MAX_REFUSAL_CHARACTERS if isinstance(error, InputError) else None
        sys.exit(f"{name}: error: {as_line(str(error), limit)}")
    except device_errors() as error:
        if "out of memory" not in str(error):
            raise
        sys.exit(f"{name}: error: out of GPU memory ({first_line(error)}); {less_memory}")
    except KeyboardInterrupt:
        sys.exit(f"{name}: interrupted; {kept}")


@contextmanager
def lasting_output() -> Iterator[None]:
    """Context in which printing goes on, into nothing, once nobody reads standard output or error any more."""
    with redirect_stdout(LastingStream(sys.stdout)), redirect_stderr(LastingStream(sys.stderr)):
        yield


class LastingStream:
    """Standard output or error that goes nowhere once its reader is gone, instead of ending the run.

    The reader is a terminal, or a program such as `tee`.
    """

    def __init__(self, stream: TextIO | None):
        # Python has no stream if the descriptor was closed at its start.
        self._stream = open(os.devnull, "w", encoding="utf-8") if stream is None else stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except UnicodeEncodeError:  # an ASCII locale
            encoding = self._stream.encoding
            return self._stream.write(text.encode(encoding, errors="backslashreplace").decode(encoding))
        except OSError:
            self._discard()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            self._discard()

    def _discard(self) -> None:
        with suppress(OSError, ValueError):  # ValueError: the stream has no descriptor
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)

    def __getattr__(self, name: str):
        return getattr(self._stream, name)
