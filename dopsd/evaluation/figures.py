"""Figures as functions of features: P prompts, S seeds, N training pictures, D channels.

A figure has a value per picture, (P, S). NaN stands for a picture that it cannot be measured on.
"""

import torch
from torch.nn.functional import cosine_similarity, normalize

from .comparison import Figure


MOST_DIFFERENT = 0.15  # of a copy, where black is -1 and white is 1


def likeness(drawn: torch.Tensor, training: torch.Tensor) -> torch.Tensor:
    """(P, S): mean cosine of (P, S, D) drawn pictures with the (N, D) training pictures."""
    return (normalize(drawn, dim=-1) @ normalize(training, dim=-1).T).mean(-1)


def closeness(drawn: torch.Tensor, training: torch.Tensor) -> torch.Tensor:
    """(P, S): highest cosine of (P, S, D) drawn pictures with one of the (N, D) training pictures."""
    return (normalize(drawn, dim=-1) @ normalize(training, dim=-1).T).amax(-1)


def among_themselves(training: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and highest cosine of each of (N, D) pictures with the others, both (N,). N is at least 2."""
    cosines = normalize(training, dim=-1) @ normalize(training, dim=-1).T
    others = cosines[~torch.eye(len(cosines), dtype=torch.bool)].view(len(cosines), -1)
    return others.mean(1), others.amax(1)


def nearest_difference(pictures: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """(P, S): root mean square difference of (P, S, D) pixels from the nearest of (N, D) others."""
    return torch.cdist(pictures, others).amin(-1) / others.shape[-1] ** 0.5


def copy_limit(training: torch.Tensor) -> float:
    """The difference up to which a drawing counts as the copy of one of (N, D) training pictures.

    It is half of what a training picture typically has from the nearest other one, and at most `MOST_DIFFERENT`.
    """
    if len(training) < 2:
        return MOST_DIFFERENT
    differences = torch.cdist(training, training).fill_diagonal_(torch.inf).amin(1) / training.shape[1] ** 0.5
    return min(MOST_DIFFERENT, float(differences.quantile(0.5)) / 2)


def cosine_by_prompt(drawn: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
    """(P, S): cosine of (P, S, D) drawn pictures with what they were drawn from, (P, D) texts or pictures to edit."""
    return cosine_similarity(drawn, given[:, None], dim=-1)


def retention(drawn: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    """(P, S): cosine of each picture with the base's of the same prompt and seed, both (P, S, D)."""
    return cosine_similarity(drawn, base, dim=-1)


def diversity(drawn: torch.Tensor) -> torch.Tensor:
    """(P, S): mean of 1 - cosine of each picture with those of the other seeds of its prompt.

    Args:
        drawn: (P, S, D), S at least 2.
    """
    units = normalize(drawn, dim=-1)
    num_seeds = units.shape[1]
    cosines = units @ units.mT
    return 1 - (cosines.sum(-1) - cosines.diagonal(dim1=1, dim2=2)) / (num_seeds - 1)


def relative_to_base(values: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    """(P, S) values over the mean of the base's (P, S) of the same prompt; NaN where that is 0."""
    mean = base.mean(1, keepdim=True)
    return torch.where(mean > 0, values / mean, torch.nan)


def summary(values: torch.Tensor, count: int | None = None) -> Figure | None:
    """The figure of (P, S) values; None if all of them are NaN.

    Args:
        count: how many there are, unless it is the number of values.
    """
    known = ~values.isnan()
    if not known.any():
        return None
    return Figure(
        mean=float(values.nanmean()),
        over_prompts=spread(values.nanmean(1)),
        over_seeds=spread(values.nanmean(0)),
        count=int(known.sum()) if count is None else count,
    )


def spread(means: torch.Tensor) -> float | None:
    """Standard deviation of a sample; None if fewer than two of its values are known."""
    known = means[~means.isnan()]
    return float(known.std()) if len(known) > 1 else None
