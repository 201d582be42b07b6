"""How far a student's images are from the base model's, in latents."""

import torch


def distances(base: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    """(N,) distances between (N, ...) latents; row i of both is drawn from the same prompt and noise."""
    return (student.float() - base.float()).flatten(1).norm(dim=1)


def mean_distance(latents: torch.Tensor) -> torch.Tensor:
    """Mean distance between the rows of (N, ...) latents, N at least 2: what another prompt's picture is away."""
    return torch.nn.functional.pdist(latents.float().flatten(1)).mean()


def relative_drift(base: torch.Tensor, student: torch.Tensor) -> float:
    """Mean distance of the student's latents from the base's, relative to the mean distance between the base's own.

    0: nothing has changed. 1: as different as another prompt's image.

    Args:
        base, student: (N, ...), N at least 2; row i of both is drawn from the same prompt and noise.
    """
    return (distances(base, student).mean() / mean_distance(base)).item()
