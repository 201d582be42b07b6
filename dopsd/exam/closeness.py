"""How close a drawing comes to a picture: distances of VAE latents, and of features. 0 is the same picture."""

import torch
from torch.nn.functional import adaptive_avg_pool2d, avg_pool2d, cosine_similarity, unfold


PLACE_CELLS = 8  # cells of the longer side, in each of which the latents are averaged
PATCH_CELLS = 32  # of the longer side of larger latents, so that a patch shows more than texture
PATCH = 2  # cells, side of a patch


def distance_in_place(drawing: torch.Tensor, picture: torch.Tensor) -> float:
    """Root mean square difference of (C, h, w) latents at low resolution.

    A picture of another size is brought to the drawing's.
    """
    rows, columns = (max(1, round(side * PLACE_CELLS / max(drawing.shape[1:]))) for side in drawing.shape[1:])
    first, second = (adaptive_avg_pool2d(latents.float(), (rows, columns)) for latents in (drawing, picture))
    return float((first - second).square().mean().sqrt())


def distance_anywhere(drawing: torch.Tensor, picture: torch.Tensor) -> float:
    """How far the patches of one are from those that are most like them, anywhere in the other.

    The mean of both directions: what the picture shows is in the drawing, and the drawing shows nothing else. A
    subject that is drawn in another place is found.
    """
    return (missing(picture, drawing) + missing(drawing, picture)) / 2


def missing(first: torch.Tensor, second: torch.Tensor) -> float:
    """Root mean square difference of the patches of (C, h, w) latents from the nearest ones of others, on average."""
    side = max(1, round(max(first.shape[1:]) / PATCH_CELLS))
    own, others = patches(first, side, stride=side), patches(second, side, stride=1)
    return float(torch.cdist(own, others).min(1).values.mean()) / own.shape[1] ** 0.5


def patches(latents: torch.Tensor, side: int, stride: int) -> torch.Tensor:
    """(N, C * PATCH^2): patches of (C, h, w) latents, which overlap.

    Args:
        side: of a cell of a patch, over which the latents are averaged.
        stride: from one patch to the next.
    """
    cells = avg_pool2d(latents.float(), side, stride=1)
    return unfold(cells[None], PATCH, dilation=side, stride=stride)[0].T


def distance_of_features(drawing: torch.Tensor, picture: torch.Tensor) -> float:
    """1 - cosine of two (D,) features."""
    return 1 - float(cosine_similarity(drawing.double(), picture.double(), dim=0))
