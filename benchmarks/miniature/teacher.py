"""The world in latent space, and the closed-form teacher that the miniature is distilled from.

The pictures that a caption allows are known: every pose of the object that it names, plus grain. Their latents form a
mixture of Gaussians with known means and a shared covariance, so neither the posterior mean E[x0 | x_sigma] nor the
probability-flow ODE needs a network. Convention: x_sigma = (1 - sigma) x0 + sigma noise.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from benchmarks.miniature import world


NUM_GRAIN_PICTURES = 1024  # for measuring the grain's covariance


@dataclass(frozen=True)
class LatentWorld:
    """Latents of S scenes without grain. A scene is an object on a background.

    Attributes:
        objects, backgrounds: (S,), indices into the sprites and into `world.BACKGROUNDS`.
        means: (S, P, 8, 8, 64), float16: every scene at each of the P poses.
        covariance: (64, 64), of what grain adds to a token.
    """

    objects: torch.Tensor
    backgrounds: torch.Tensor
    means: torch.Tensor
    covariance: torch.Tensor


def encode_world(
    encode: Callable[[torch.Tensor], torch.Tensor],
    sprites: np.ndarray,
    scenes: list[tuple[int, int]],
    *,
    log: Callable[[dict], None],
) -> LatentWorld:
    """Encodes every scene at every pose.

    Args:
        encode: (N, 3, 64, 64) -> (N, 8, 8, 64).
        sprites: (N, 40, 40, 4).
        scenes: (index of a sprite, index of a background) of each scene.
        log: called with a dict of metrics.
    """
    names = list(world.BACKGROUNDS)
    means = []
    for index, (sprite, background) in enumerate(scenes):
        pictures = [world.draw(sprites[sprite], pose, names[background]) for pose in world.POSES]
        means.append(encode(world.to_tensor(pictures)).half())
        if index % 1000 == 999:
            log({"scenes_encoded": index + 1})
    objects, backgrounds = torch.tensor(scenes).unbind(1)
    return LatentWorld(objects, backgrounds, torch.stack(means), grain_covariance(encode, sprites))


def grain_covariance(encode: Callable[[torch.Tensor], torch.Tensor], sprites: np.ndarray) -> torch.Tensor:
    """(64, 64): covariance of the difference between tokens of random pictures with and without grain."""
    rng = np.random.default_rng(4)
    clean = np.stack(
        [
            world.draw(sprites[rng.integers(len(sprites))], world.random_pose(rng), world.random_background(rng))
            for _ in range(NUM_GRAIN_PICTURES)
        ]
    )
    grain = np.stack([world.grain(rng) for _ in range(NUM_GRAIN_PICTURES)])
    difference = encode(world.to_tensor(clean + grain)) - encode(world.to_tensor(clean))
    tokens = difference.flatten(0, 2)
    return tokens.T @ tokens / len(tokens)


class PosteriorTeacher:
    """Follows the probability-flow ODE from one deployed sigma to the next.

    Each of the K segments is divided into substeps. Within a substep the posterior mean m of the mixture's centres is
    held constant and the Gaussian part is integrated exactly:

        x' = (1 - sigma') m + (C' / C)^(1/2) (x - (1 - sigma) m)

    where C = (1 - sigma)^2 covariance + sigma^2 is the covariance of the states around a centre.

    The posterior over the centres is computed from a few directions of each token only (`pose_directions`). In these
    directions the flow is exact; in the others, states follow the centre that these have chosen. With all 64
    directions it is the full posterior, which makes the choice in the first segment, by details of the noise that a
    small student cannot read.

    Args:
        latent_world: provides the grain's covariance and the directions.
        sigmas: (K + 1,), the deployed schedule.
        num_directions: D, the directions of a token from which the posterior is computed, 1 to 64.
        num_substeps: substeps per segment.
    """

    def __init__(self, latent_world: LatentWorld, sigmas: torch.Tensor, *, num_directions: int, num_substeps: int):
        covariance = latent_world.covariance.double()
        sigmas = sigmas.double()[:, None]
        fine = torch.lerp(sigmas[:-1], sigmas[1:], torch.linspace(0, 1, num_substeps + 1).double())
        self.num_substeps = num_substeps
        self.signal = (1 - fine).float()  # (K, substeps + 1)
        values, vectors = torch.linalg.eigh(covariance)
        std = ((1 - fine[..., None]) ** 2 * values.clamp(min=0) + fine[..., None] ** 2).sqrt()
        ratio = std[:, 1:] / std[:, :-1]
        self.contraction = (vectors * ratio[..., None, :] @ vectors.T).float()  # (K, substeps, 64, 64)
        directions = pose_directions(latent_world, num_directions)
        self.directions = directions.T  # (64, D)
        coarse = directions.double() @ covariance @ directions.T.double()
        start = fine[:, :-1, None, None]
        state = (1 - start) ** 2 * coarse + start**2 * torch.eye(num_directions, dtype=torch.float64)
        self.whitening = torch.linalg.cholesky(torch.linalg.inv(state)).float()  # (K, substeps, D, D)

    def advance(self, states: torch.Tensor, segments: torch.Tensor, means: torch.Tensor) -> torch.Tensor:
        """Takes states from the start of their segments to the end.

        Args:
            states: (B, 8, 8, 64), on the teacher's trajectory or off it.
            segments: (B,), 0 to K - 1.
            means: (B, M, 8, 8, 64), the pictures that each caption allows, all equally likely.

        Returns:
            (B, 8, 8, 64).
        """
        shape = states.shape
        states, means = states.flatten(1, 2), means.flatten(2, 3)
        coarse_means = means @ self.directions  # (B, M, 64, D)
        for substep in range(self.num_substeps):
            signal, next_signal = (self.signal[segments, substep + i].view(-1, 1, 1) for i in (0, 1))
            distance = (states @ self.directions)[:, None] - signal[..., None] * coarse_means
            distance = distance @ self.whitening[segments, substep][:, None]
            weights = (distance.square().sum((2, 3)) / -2).softmax(1)
            mean = (weights[:, None] @ means.flatten(2)).view_as(states)
            states = next_signal * mean + (states - signal * mean) @ self.contraction[segments, substep]
        return states.view(shape)


def pose_directions(latent_world: LatentWorld, count: int) -> torch.Tensor:
    """(count, 64): orthonormal directions of a token along which the poses of a scene differ most."""
    means = latent_world.means[::7].float()
    tokens = (means - means.mean(1, keepdim=True)).flatten(0, 3)
    return torch.linalg.eigh(tokens.T @ tokens).eigenvectors[:, -count:].T
