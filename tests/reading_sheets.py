"""Finds pictures on contact sheets."""

from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image


@lru_cache(maxsize=2)
def pixels_of(sheet: Path) -> np.ndarray:
    with Image.open(sheet) as opened:
        return np.asarray(opened.convert("RGB"))


def place(sheet: Path, image: Image.Image, cell_pixels: int = 320) -> tuple[int, int] | None:
    """(top, left) of exactly this picture on a contact sheet, enlarged by an integer factor, or None."""
    factor = cell_pixels // max(image.size)
    enlarged = np.asarray(image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST))
    pixels = pixels_of(sheet)
    height, width, _ = enlarged.shape
    corners = (pixels[: -height + 1, : -width + 1] == enlarged[0, 0]).all(axis=2)
    corners &= (pixels[height - 1 :, width - 1 :] == enlarged[-1, -1]).all(axis=2)
    for top, left in np.argwhere(corners):
        if np.array_equal(pixels[top : top + height, left : left + width], enlarged):
            return int(top), int(left)
    return None


def are_in_a_row(sheet: Path, *images: Image.Image, cell_pixels: int = 320) -> bool:
    """Whether all are on the sheet, at one height, from left to right."""
    places = [place(sheet, image, cell_pixels) for image in images]
    return None not in places and len({top for top, _ in places}) == 1 and places == sorted(places)


def are_in_a_column(sheet: Path, *images: Image.Image) -> bool:
    """Whether all are on the sheet, below each other from top to bottom."""
    places = [place(sheet, image) for image in images]
    return None not in places and len({left for _, left in places}) == 1 and places == sorted(places)
