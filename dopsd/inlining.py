"""Pictures inside an HTML page.

A PNG of at most `MAX_PNG_BYTES` is inlined as it is, a larger one as a JPEG of quality `JPEG_QUALITY`, if that is
smaller.
"""

import base64
import io
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from .data.images import PILLOW_ERRORS
from .files import read_regular_file
from .markup import Markup, element


MAX_PNG_BYTES, JPEG_QUALITY = 200_000, 75


@dataclass(frozen=True)
class Picture:
    """A sheet as it is inlined.

    Attributes:
        num_bytes: before base64.
    """

    url: str
    size: tuple[int, int]
    num_bytes: int


def inlined(path: Path) -> Picture | None:
    """A sheet by that rule; None if it is missing or damaged."""
    try:
        content, kind = read_regular_file(path), "png"
        with Image.open(io.BytesIO(content)) as image:
            image.load()
            if len(content) > MAX_PNG_BYTES:
                jpeg = io.BytesIO()
                image.convert("RGB").save(jpeg, format="JPEG", quality=JPEG_QUALITY)
                if jpeg.tell() < len(content):
                    content, kind = jpeg.getvalue(), "jpeg"
    except PILLOW_ERRORS:
        return None
    url = f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
    return Picture(url, image.size, len(content))


def figure(picture: Picture | None, description: str) -> Markup | None:
    if picture is None:
        return None
    width, height = map(str, picture.size)
    return element("figure", element("img", src=picture.url, alt=description, width=width, height=height))


class Tab(NamedTuple):
    """A picture that is shown when its label is chosen.

    Attributes:
        key: unique among the tabs.
        alt: what the picture shows.
    """

    key: str
    label: str
    alt: str
    picture: Picture


def radio_tabs(name: str, tabs: Iterable[Tab]) -> Markup:
    """One picture at a time, first the first one. The arrow keys go through them.

    Args:
        name: unique on the page.
    """
    parts = []
    for number, tab in enumerate(tabs):
        key, checked = f"{name}-{tab.key}", {"checked": ""} if number == 0 else {}
        parts += [
            element("input", type="radio", name=name, id=key, **checked),
            element("label", tab.label, for_=key),
            figure(tab.picture, tab.alt),
        ]
    return element("div", *parts, class_="tabs")
