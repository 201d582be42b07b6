"""Captions from the .txt files beside the pictures."""

import posixpath
import re
from pathlib import Path

from accelerate.logging import get_logger

from ..errors import InputError
from ..settings import DataSettings
from ..text import printable
from .captions import check_caption, is_text
from .files import NameIndex, read_text


logger = get_logger(__name__)

# Text files with these names come with many data sets. They are captions only if a picture has the same name.
DOCUMENTS = ("readme", "license", "licence", "notice", "copyright", "credits")

MAX_SIDECAR_BYTES = 2**20


def match_sidecars(pictures: list[str], texts: list[str]) -> dict[str, str]:
    """Picture -> the .txt file with the same name up to the extension, for every picture that has one.

    Names may differ in case and in the form of accents if no file has exactly the picture's name, and if the file does
    not belong to another picture.

    Args:
        pictures: names of all pictures.
        texts: names of all .txt files.

    Raises:
        InputError: it is not clear which file belongs to which picture.
    """
    text_of: dict[str, str] = {}
    for name in texts:
        other = text_of.setdefault(_stem(name), name)
        if other != name:
            raise InputError(f"{other}, {name}: both may be the caption of one picture; keep one of them")
    exact = {name: text_of[_stem(name)] for name in pictures if _stem(name) in text_of}
    rest = NameIndex(text_of.keys() - map(_stem, exact))
    matched, owner = {**exact}, {}
    for name in pictures:
        if name in exact:
            continue
        found = [text_of[stem] for stem in rest.find(_stem(name))]
        if len(found) > 1:
            raise InputError(f"{name}: its caption may be {found[0]} or {found[1]}; give one of them the same name")
        for text in found:
            other = owner.setdefault(text, name)
            if _stem(other) != _stem(name):
                raise InputError(f"{text}: may be the caption of {other} or of {name}; write one for each, same names")
            matched[name] = text
    return matched


def check_sidecars(pictures: list[str], texts: list[str], text_of: dict[str, str]) -> None:
    """Checks that every picture has a .txt file, and the reverse.

    Args:
        pictures: names of all pictures.
        texts: names of all .txt files.
        text_of: the result of `match_sidecars`.

    Raises:
        InputError: one of them has no counterpart.
    """
    for name in pictures:
        if name not in text_of:
            raise InputError(
                f"{name}: has no caption, although other pictures have a .txt file; write its caption to "
                f"{_stem(name)}.txt"
            )
    for text in sorted({*texts} - {*text_of.values()}):
        if not is_document(text):
            raise InputError(
                f"{text}: there is no picture named {posixpath.basename(_stem(text))} beside it; add the picture, or "
                "move the file elsewhere"
            )


def sidecar_captions(lines_of: dict[str, list[str]], settings: DataSettings) -> dict[str, tuple[str, ...]]:
    """.txt file -> captions in it.

    Args:
        lines_of: .txt file -> its lines, see `read_lines`.
        settings: say how to read files of several lines. Their `instance_prompt` is not used; a warning says so.

    Raises:
        InputError: a file is empty, or its text cannot be used.
    """
    if is_text(settings.instance_prompt):
        logger.warning("--instance_prompt is not used: the captions come from the .txt files beside the pictures")
    several = [text for text, lines in lines_of.items() if sum(map(is_text, lines)) > 1]
    if several and settings.multiline_captions is None:
        logger.warning(
            f"{printable(several[0])}: has several lines, as {len(several)} of {len(lines_of)} .txt files do; each "
            "file is one caption with line breaks. If each line is a caption, pass --multiline_captions "
            "caption_per_line; one_caption turns off this warning"
        )
    per_line = settings.multiline_captions == "caption_per_line"
    return {text: _captions(text, lines, per_line) for text, lines in lines_of.items()}


def is_document(name: str) -> bool:
    """Whether a .txt file without a picture is a data set's documentation, judging by its name."""
    return posixpath.basename(_stem(name)).casefold() in DOCUMENTS


def _stem(name: str) -> str:
    return posixpath.splitext(name)[0]


def read_lines(path: Path, name: str) -> list[str]:
    """A .txt file's lines, with their line breaks.

    Raises:
        InputError: it cannot be read, is too long or not UTF-8. The message calls it `name`.
    """
    # str.splitlines would also split at characters such as U+2028.
    return re.findall(r".*?(?:\r\n|\r|\n)|.+$", read_text(path, name, max_bytes=MAX_SIDECAR_BYTES), re.DOTALL)


def _captions(name: str, lines: list[str], per_line: bool) -> tuple[str, ...]:
    if per_line:
        found = [(f"{name} line {number}", line.strip()) for number, line in enumerate(lines, start=1)]
    else:
        found = [(name, "".join(lines).strip())]
    captions = tuple(check_caption(caption, place) for place, caption in found if caption)
    if not captions:
        raise InputError(f"{name}: is empty; write the caption into it")
    return captions
