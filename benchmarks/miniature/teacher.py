"""The world in latent space, and the closed-form teacher that the miniature is distilled from.

The pictures that a caption allows are known: every pose of the object it names, plus grain. In latent space they are
a mixture of Gaussians with known means and one covariance, so the posterior mean E[x0 | x_sigma] and with it the
probability-flow ODE need no network. Conventions as everywhere: x_sigma = (1 - sigma) x0 + sigma noise.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import AutoencoderKLFlux2

import world
from vae import encode, to_tensor


GRAIN_PICTURES = 1024  # from which the grain's covariance is measured


@dataclass(frozen=True)
class LatentWorld:
    """Latents of the world's pictures without grain. A scene is an object on a background.

    Attributes:
        objects, backgrounds: (S,), each scene's, indices into the sprites and into `world.BACKGROUNDS`.
        means: (S, P, 8, 8, 64), float16: each scene at every pose.
        covariance: (64, 64): of what grain adds, within a token.
    """

    objects: torch.Tensor
    backgrounds: torch.Tensor
    means: torch.Tensor
    covariance: torch.Tensor


def encode_world(
    vae: AutoencoderKLFlux2, sprites: np.ndarray, scenes: list[tuple[int, int]], *, log: Callable
) -> LatentWorld:
    """Encodes scenes, (index of a sprite, index of a background) each, at every pose.

    Args:
        sprites: (N, 40, 40, 4).
        log: takes a dict of figures.
    """
    names = list(world.BACKGROUNDS)
    means = []
    for index, (sprite, background) in enumerate(scenes):
        pictures = np.stack([world.draw(sprites[sprite], pose, names[background]) for pose in world.POSES])
        means.append(encode(vae, to_tensor(pictures)).half())
        if index % 1000 == 999:
            log({"scenes_encoded": index + 1})
    objects, backgrounds = torch.tensor(scenes).unbind(1)
    return LatentWorld(objects, backgrounds, torch.stack(means), grain_covariance(vae, sprites))


def grain_covariance(vae: AutoencoderKLFlux2, sprites: np.ndarray) -> torch.Tensor:
    """(64, 64): of the tokens of random pictures with grain less those without."""
    random = np.random.default_rng(4)
    clean = np.stack(
        [
            world.draw(
                sprites[random.integers(len(sprites))],
                world.POSES[random.integers(len(world.POSES))],
                random.choice(list(world.BACKGROUNDS)),
            )
            for _ in range(GRAIN_PICTURES)
        ]
    )
    grain = np.stack([world.grain(random) for _ in range(GRAIN_PICTURES)])
    tokens = (encode(vae, to_tensor(clean + grain)) - encode(vae, to_tensor(clean))).flatten(0, 2)
    return tokens.T @ tokens / len(tokens)


class PosteriorTeacher:
    """Walks the probability-flow ODE from one deployed sigma to the next.

    Between two points of a fine grid the posterior mean m of the mixture's centres is held, and the Gaussian part is
    integrated exactly: x' = (1 - sigma') m + (C' / C)^(1/2) (x - (1 - sigma) m), where
    C = (1 - sigma)^2 covariance + sigma^2 is the state's covariance around a centre.

    Which centre a state belongs to is judged in a few directions of each token (`pose_directions`): the posterior
    given that part of the state. There the flow is exact; the other directions follow the centre that this part has
    chosen. With all 64 directions it is the full posterior, which decides in the first segment by details of the
    noise that a small student cannot read.

    Args:
        latent_world: for the grain's covariance and the directions.
        sigmas: (K + 1,), the deployed schedule.
        num_directions: how many directions of a token judge the centre.
        num_substeps: points of the fine grid in each of the K segments.
    """

    def __init__(self, latent_world: LatentWorld, sigmas: torch.Tensor, *, num_directions: int, num_substeps: int = 6):
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
        """The states at the end of their segments.

        Args:
            states: (B, 8, 8, 64), any states: a teacher's or a student's.
            segments: (B,), 0 to K - 1.
            means: (B, M, 8, 8, 64), the pictures that each caption allows, all equally likely.
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
    """(count, 64): the orthonormal directions of a token in which the poses of a scene differ most."""
    means = latent_world.means[::7].float()
    tokens = (means - means.mean(1, keepdim=True)).flatten(0, 3)
    return torch.linalg.eigh(tokens.T @ tokens).eigenvectors[:, -count:].T
