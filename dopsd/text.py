"""Text from users: what can be used as a prompt or path, and what can be printed."""

import os
import sys
import unicodedata


MAX_CAPTION_CHARACTERS = 20_000


def printable(text: str) -> str:
    """The text with escapes for line breaks, control characters and lone surrogates (bytes that are not UTF-8)."""
    return "".join(
        char.encode("unicode_escape").decode() if unicodedata.category(char) in ("Cc", "Cs", "Zl", "Zp") else char
        for char in text
    )


def text_problem(text: str) -> str | None:
    """Why a caption or prompt cannot be used, and what to do; None if it can."""
    if len(text) > MAX_CAPTION_CHARACTERS:
        return f"is {len(text):,} characters long; shorten it to at most {MAX_CAPTION_CHARACTERS:,}"
    if "\0" in text:
        return "contains a zero byte, so it is not UTF-8 text; save it as UTF-8"
    half = next((char for char in text if "\ud800" <= char <= "\udfff"), None)
    if half is not None:
        return f"contains {half!r}, which is half of a character; write the whole character"
    return None


def argument_problem(argument: str) -> str | None:
    """Why the value of a flag, a prompt or a path, cannot be used, and what to do; None if it can."""
    encoding = sys.getfilesystemencoding()
    advice = f"is not text in this locale, whose encoding is {encoding}; set the environment variable PYTHONUTF8=1"
    try:
        given = os.fsencode(argument)  # Python decodes a byte that is not text as a lone surrogate
    except UnicodeEncodeError:
        return text_problem(argument) or advice
    try:
        decoded = given.decode("utf-8")
    except UnicodeDecodeError as error:
        return (
            f"contains the byte 0x{given[error.start]:02x}, which is not UTF-8; write it in UTF-8, or rename the file"
        )
    return text_problem(argument) if decoded == argument else advice
