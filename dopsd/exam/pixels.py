"""Pictures as tensors, and what the exam measures on them: sharpness, and how much of a background is shown."""

import math

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import avg_pool2d, conv2d, interpolate, pad

from .thresholds import LEAST_BACKGROUND, MOST_BACKGROUND, PLAIN_BORDER, SAME_COLOUR


LUMINANCE = (0.299, 0.587, 0.114)
BLOCK = 8  # pixels; sharpness is measured in the blocks with the most edges
EDGE_SHARE = 0.25  # of the blocks
BACKGROUND_SIDE, BORDER = 32, 3  # pixels: of the shrunk picture, and of its border


def as_tensor(image: Image.Image) -> torch.Tensor:
    """(3, H, W), -1 to 1."""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float() / 127.5 - 1


def smoothed(pixels: torch.Tensor, sigma: float) -> torch.Tensor:
    """Convolves (C, H, W) with a Gaussian; the border's pixels continue outwards."""
    radius = math.ceil(3 * sigma)
    offsets = torch.arange(-radius, radius + 1)
    kernel = torch.exp(-offsets.square() / (2 * sigma**2))
    kernel = (kernel / kernel.sum())[None, None, None]
    padded = pad(pixels[:, None], (radius, radius, radius, radius), mode="replicate")
    return conv2d(conv2d(padded, kernel), kernel.mT)[:, 0]


def shrunk(pixels: torch.Tensor, side: int) -> torch.Tensor:
    """(C, H, W) resized so that the longer side has `side` pixels, an even number, and the other one too."""
    factor = side / max(pixels.shape[1:])
    return resized(pixels, tuple(max(2, 2 * round(length * factor / 2)) for length in pixels.shape[1:]))


def resized(pixels: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """(C, H, W) resized to `size`; what becomes smaller is averaged."""
    return interpolate(pixels[None], size, mode="bilinear", antialias=True, align_corners=False)[0]


def luminance(pixels: torch.Tensor) -> torch.Tensor:
    """(1, H, W) of (3, H, W)."""
    return (pixels * torch.tensor(LUMINANCE).view(3, 1, 1)).sum(0, keepdim=True)


def block_energies(band: torch.Tensor) -> torch.Tensor:
    """Mean square of (1, H, W) in each of its blocks, one after the other."""
    return avg_pool2d(band.square(), min(BLOCK, *band.shape[1:])).flatten()


def sharpness(pixels: torch.Tensor) -> float:
    """Amplitude of the finest octave over that of the next one, in the quarter of the blocks with the most edges.

    Both grow with contrast, so their ratio does not depend on it, nor on how much of the picture is out of focus.
    About 1 for photographs, 0.5 after a Gaussian blur of one pixel; 0 for a picture without edges.
    """
    grey = luminance(pixels)
    fine = smoothed(grey, 1.0)
    finest, next_octave = (block_energies(band) for band in (grey - fine, fine - smoothed(fine, 2.0)))
    blocks = next_octave.topk(max(1, int(len(next_octave) * EDGE_SHARE))).indices
    energy = float(next_octave[blocks].sum())
    return math.sqrt(float(finest[blocks].sum()) / energy) if energy > 1e-9 else 0.0


def fine_detail(pixels: torch.Tensor) -> float:
    """Amplitude of the finest octave in the median block: grain and fine texture, hardly any edges. 0 is smooth.

    It grows with contrast, and the more of a picture is textured, so it compares pictures of the same prompt.
    """
    grey = luminance(pixels)
    return math.sqrt(float(block_energies(grey - smoothed(grey, 1.0)).median()))


def background_colours(pixels: torch.Tensor, size: tuple[int, int] | None = None) -> torch.Tensor:
    """(3, h, w): the picture at 32 pixels, or at `size`, and smoothed, so that fine texture is no difference."""
    return smoothed(shrunk(pixels, BACKGROUND_SIDE) if size is None else resized(pixels, size), 1.0)


def background_mask(colours: torch.Tensor) -> torch.Tensor | None:
    """Where a picture shows its background: (h, w), bool. None if it cannot be told from the subject by its colour.

    The background is what has the median colour of the border, if most of the border has that colour.

    Args:
        colours: from `background_colours`.
    """
    border = torch.ones(colours.shape[1:], dtype=torch.bool)
    border[BORDER:-BORDER, BORDER:-BORDER] = False
    colour = colours[:, border].median(1).values
    mask = (colours - colour[:, None, None]).norm(dim=0) < SAME_COLOUR
    share = float(mask.float().mean())
    if float(mask[border].float().mean()) < PLAIN_BORDER or not LEAST_BACKGROUND <= share <= MOST_BACKGROUND:
        return None
    return mask


def shown_background(drawing: torch.Tensor, picture: torch.Tensor) -> float | None:
    """Share of the picture's background at which the drawing has the picture's colours.

    Args:
        drawing, picture: (3, H, W), of any two sizes.

    Returns:
        0 to 1; None if background and subject of the picture cannot be separated.
    """
    colours = background_colours(picture)
    mask = background_mask(colours)
    if mask is None:
        return None
    same = (background_colours(drawing, colours.shape[1:]) - colours).norm(dim=0) < SAME_COLOUR
    return float(same[mask].float().mean())
