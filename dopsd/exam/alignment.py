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
TRANSFORM = 160  # pixels, side of the Fourier transforms: no smaller than the two pictures together


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
    fixed = spectra(shrunk(drawing, SIDE))
    if max(picture.shape[1:]) > MAX_SIDE:
        picture = shrunk(picture, MAX_SIDE)
    found: dict[int, tuple[float, int, int, Spectra]] = {}

    def quality_at(side: int) -> float:
        if side not in found:
            moving = spectra(shrunk(picture, side))
            found[side] = *best_shift(fixed, moving), moving
        return found[side][0]

    coarse = max(COARSE_SCALES, key=quality_at)
    side = max((coarse - STEP, coarse, coarse + STEP), key=quality_at)
    quality, down, right, moving = found[side]
    before, after = quality_at(side - STEP), quality_at(side + STEP)
    # The vertex of the parabola through three scales.
    curvature = before - 2 * quality + after
    is_peak = quality >= max(before, after) and curvature < 0  # not so at the end of the search
    between = STEP * (before - after) / (2 * curvature) if is_peak else 0.0
    return Alignment(
        scale=(side + between) / SIDE,
        right=(right + (moving.width - fixed.width) / 2) / fixed.width,
        down=(down + (moving.height - fixed.height) / 2) / fixed.height,
        quality=quality,
    )


@dataclass(frozen=True)
class Spectra:
    """Fourier transforms of a picture's detail, of its energy, and of the picture's area.

    Attributes:
        height, width: of the picture, in pixels.
    """

    height: int
    width: int
    details: torch.Tensor  # (C, TRANSFORM, TRANSFORM / 2 + 1)
    energy: torch.Tensor  # (TRANSFORM, TRANSFORM / 2 + 1)
    area: torch.Tensor  # the same


def spectra(pixels: torch.Tensor) -> Spectra:
    """Of (C, H, W) pixels without what is coarser than `HIGH_PASS`."""
    details = pixels - smoothed(pixels, HIGH_PASS)
    maps = [details, details.square().sum(0, keepdim=True), torch.ones_like(details[:1])]
    *channels, energy, area = torch.fft.rfft2(torch.cat(maps), s=(TRANSFORM, TRANSFORM))
    return Spectra(*pixels.shape[1:], torch.stack(channels), energy, area)


def best_shift(fixed: Spectra, moving: Spectra) -> tuple[float, int, int]:
    """The shift of `moving` against `fixed` with the largest normalised cross-correlation over their overlap.

    All shifts are computed at once by Fourier transforms, with masks for the overlap (Padfield, Masked object
    registration in the Fourier domain, 2012). The overlap's mean is not subtracted: without coarse structure, it is
    about zero.

    Returns:
        The correlation, and by how many pixels down and to the right the corner of `moving` lies in `fixed`.
    """
    products = [
        (fixed.details * moving.details.conj()).sum(0),
        fixed.energy * moving.area.conj(),
        fixed.area * moving.energy.conj(),
        fixed.area * moving.area.conj(),
    ]
    covariance, *energies, overlap = torch.fft.irfft2(torch.stack(products), s=(TRANSFORM, TRANSFORM))
    scale = (energies[0].clamp(min=0) * energies[1].clamp(min=0)).sqrt()
    # Where one of the two has next to no detail, the quotient is noise.
    correlation = torch.where(scale > 1e-3 * scale.max() + 1e-6, covariance / scale.clamp(min=1e-6), 0.0)
    least = LEAST_OVERLAP * min(fixed.height * fixed.width, moving.height * moving.width)
    correlation = torch.where(overlap >= least - 0.5, correlation, -1.0)
    down, right = divmod(int(correlation.argmax()), TRANSFORM)
    # Negative shifts are at the end.
    down -= TRANSFORM if down >= fixed.height else 0
    right -= TRANSFORM if right >= fixed.width else 0
    return float(correlation.max().clamp(max=1)), down, right
