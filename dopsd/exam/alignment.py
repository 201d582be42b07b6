"""The zoom and shift that align a drawing best with a picture, found by normalised cross-correlation."""

from dataclasses import dataclass

import torch

from .pixels import shrunk, smoothed
from .thresholds import ALIGNED


SIDE = 64  # pixels of the drawing's longer side; the picture is resized to other sides than that
STEP = 2  # pixels: only pictures whose sides are both even or both odd have centres that can coincide
COARSE_SCALES = range(46, 94, 2 * STEP)  # over SIDE: a zoom of 0.72 to 1.41
MAX_SIDE = 256  # pixels; larger pictures are shrunk once, before they are resized to all scales
HIGH_PASS = 4.0  # pixels, sigma: what is coarser, such as a bright sky above a dark ground, aligns with anything
LEAST_OVERLAP = 0.4  # of the smaller of the two


@dataclass(frozen=True)
class Alignment:
    """The zoom and shift with which a picture resembles a drawing most.

    Attributes:
        scale: above 1, the drawing shows the picture enlarged.
        right, down: how far the picture's centre has moved in the drawing, over the drawing's sides.
        quality: their correlation, at most 1.
    """

    scale: float
    right: float
    down: float
    quality: float

    @property
    def is_found(self) -> bool:
        """Whether the two show the same; otherwise, scale and shift mean nothing."""
        return self.quality >= ALIGNED


def align(drawing: torch.Tensor, picture: torch.Tensor) -> Alignment:
    """Searches zooms from 0.7 to 1.45, and all shifts that leave an overlap of `LEAST_OVERLAP`.

    Args:
        drawing, picture: (3, H, W), of any two sizes.
    """
    fixed = details(shrunk(drawing, SIDE))
    if max(picture.shape[1:]) > MAX_SIDE:
        picture = shrunk(picture, MAX_SIDE)
    found: dict[int, tuple[float, int, int, torch.Size]] = {}

    def quality_at(side: int) -> float:
        if side not in found:
            moving = details(shrunk(picture, side))
            found[side] = *best_shift(fixed, moving), moving.shape
        return found[side][0]

    coarse = max(COARSE_SCALES, key=quality_at)
    side = max((coarse - STEP, coarse, coarse + STEP), key=quality_at)
    quality, down, right, (_, height, width) = found[side]
    before, after = quality_at(side - STEP), quality_at(side + STEP)
    # The vertex of the parabola through three scales.
    curvature = before - 2 * quality + after
    is_peak = quality >= max(before, after) and curvature < 0  # not so at the end of the search
    between = STEP * (before - after) / (2 * curvature) if is_peak else 0.0
    _, fixed_height, fixed_width = fixed.shape
    return Alignment(
        scale=(side + between) / SIDE,
        right=(right + (width - fixed_width) / 2) / fixed_width,
        down=(down + (height - fixed_height) / 2) / fixed_height,
        quality=quality,
    )


def details(pixels: torch.Tensor) -> torch.Tensor:
    """(C, H, W) without what is coarser than `HIGH_PASS`."""
    return pixels - smoothed(pixels, HIGH_PASS)


def best_shift(fixed: torch.Tensor, moving: torch.Tensor) -> tuple[float, int, int]:
    """The shift of `moving` against `fixed` with the largest normalised cross-correlation over their overlap.

    All shifts are computed at once by Fourier transforms, with masks for the overlap (Padfield, Masked object
    registration in the Fourier domain, 2012). The overlap's mean is not subtracted: without coarse structure, it is
    about zero.

    Args:
        fixed, moving: (C, H, W), from `details`, of any two sizes.

    Returns:
        The correlation, and by how many pixels down and to the right the corner of `moving` lies in `fixed`.
    """
    size = tuple(a + b - 1 for a, b in zip(fixed.shape[1:], moving.shape[1:], strict=True))

    def correlated(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        """(H, W), summed over channels."""
        product = torch.fft.rfft2(first, s=size) * torch.fft.rfft2(second, s=size).conj()
        return torch.fft.irfft2(product.sum(0), s=size)

    first_mask, second_mask = (torch.ones_like(pixels[:1]) for pixels in (fixed, moving))
    first_energy = correlated(fixed.square().sum(0, keepdim=True), second_mask)
    second_energy = correlated(first_mask, moving.square().sum(0, keepdim=True))
    scale = (first_energy.clamp(min=0) * second_energy.clamp(min=0)).sqrt()
    # Where one of the two has next to no detail, the quotient is noise.
    has_detail = scale > 1e-3 * scale.max() + 1e-6
    correlation = torch.where(has_detail, correlated(fixed, moving) / scale.clamp(min=1e-6), 0.0)
    least = LEAST_OVERLAP * min(fixed[0].numel(), moving[0].numel())
    correlation = torch.where(correlated(first_mask, second_mask) >= least - 0.5, correlation, -1.0)
    down, right = divmod(int(correlation.argmax()), size[1])
    # Negative shifts are at the end.
    down -= size[0] if down >= fixed.shape[1] else 0
    right -= size[1] if right >= fixed.shape[2] else 0
    return float(correlation.max().clamp(max=1)), down, right
