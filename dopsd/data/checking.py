"""The check of all pictures before training. Each one is decoded once, and again only if it has changed."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import PIL
from accelerate.logging import get_logger
from tqdm.auto import tqdm

from ..context_cache import content_key
from ..findings import Findings, file_state
from ..sharing import in_threads
from ..text import printable
from .images import decode
from .pictures import Picture, PictureFile


logger = get_logger(__name__)

# Increased when the check of the same picture may find something else.
CHECK_FORMAT = 1


class CheckedPicture(NamedTuple):
    """What planning and caching need to know of a picture.

    Attributes:
        size: upright (height, width) in pixels.
        digest: SHA-256 of the encoded picture in hexadecimal; "" for a caption without a picture.
        profile_problem: see `images.Decoded`.
    """

    size: tuple[int, int]
    digest: str
    profile_problem: str | None


def check_pictures(
    pictures: Sequence[Picture | PictureFile],
    *,
    resolution: int,
    disable_progress: bool,
    findings: Findings | None = None,
) -> list[CheckedPicture]:
    """Reads and decodes every picture to check it, unless an earlier check of it is known. Keeps none in memory.

    Args:
        pictures: the pictures to check.
        resolution: height and width, in pixels, to return for a caption without a picture.
        disable_progress: whether to hide the progress bar.
        findings: of earlier checks, to which those of this one are added.

    Raises:
        InputError: a picture cannot be decoded.
    """
    findings = findings or Findings(None)
    states = list(in_threads(picture_state, pictures))
    found = findings.read(filter(None, states))
    known = {state: one for state, value in found.items() if (one := as_checked(value)) is not None}

    def check(place: int) -> tuple[CheckedPicture, bool]:
        """What is known of a picture, and whether it should be remembered."""
        picture, state = pictures[place], states[place]
        if picture.source is None:
            return CheckedPicture((resolution, resolution), "", None), False
        if state in known:
            return known[state], False
        image, digest, profile_problem = decode(picture)
        checked = CheckedPicture((image.height, image.width), digest, profile_problem)
        return checked, state is not None and state == picture_state(picture)

    results = []
    places = tqdm(range(len(pictures)), desc="Reading pictures", disable=disable_progress)
    for place, (checked, is_new) in zip(places, in_threads(check, range(len(pictures))), strict=True):
        results.append(checked)
        if is_new:
            findings.add({states[place]: checked})
    return results


def as_checked(finding: Any) -> CheckedPicture | None:
    """What an earlier check has found; None if it has another form, as in a damaged file."""
    match finding:
        case [[int(height), int(width)], str(digest), str() | None as profile_problem]:
            return CheckedPicture((height, width), digest, profile_problem)
    return None


def picture_state(picture: Picture | PictureFile) -> str | None:
    """A key that changes with the encoded picture. None if there is none, or if a change might go unnoticed."""
    source = picture.source
    if source is None:
        return None
    if isinstance(source, Path):
        state = file_state(source)
        if state is None:
            return None
        parts = [os.path.abspath(source), *state]
    else:
        cell = source.read()
        if not cell.is_valid or not cell["bytes"].is_valid:
            return None
        parts = [source.dataset._fingerprint, *source[1:]]  # `datasets` finds its copy of the data by this
    return content_key(CHECK_FORMAT, PIL.__version__, *parts)


def warn_of_profiles(pictures: Sequence[Picture | PictureFile], checked: list[CheckedPicture]) -> None:
    """Warns once of all pictures whose color profiles could not be used."""
    problems = [(picture.name, one.profile_problem) for picture, one in zip(pictures, checked, strict=True)]
    problems = [(name, problem) for name, problem in problems if problem is not None]
    if problems:
        name, problem = problems[0]
        logger.warning(
            f"{printable(name)}: its color profile cannot be used ({printable(problem)}); {len(problems)} such "
            "pictures are used as if they were sRGB: convert them to sRGB if their colors look wrong"
        )
