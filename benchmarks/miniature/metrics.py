"""What pictures show and how good they are. Pictures are (N, 3, 64, 64), -1 to 1."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import AutoencoderKLFlux2

from benchmarks.miniature import world


@dataclass(frozen=True)
class Reading:
    """What N pictures show: for each one the nearest picture, without grain, that the world can draw.

    Attributes:
        objects: (N,), indices into `PictureReader.appearances`.
        poses: (N,), indices into `world.POSES`.
        backgrounds: (N,), indices into `world.BACKGROUNDS`.
        nearest: (N, 3, 64, 64), the nearest pictures.
    """

    objects: torch.Tensor
    poses: torch.Tensor
    backgrounds: torch.Tensor
    nearest: torch.Tensor


class PictureReader:
    """Recognises objects, poses and backgrounds by template matching.

    Args:
        appearances: the objects to tell apart.
        styles: to tell apart as well.

    Attributes:
        appearances, styles: of what a `Reading` counts as an object: every object in every style.
    """

    def __init__(self, appearances: list[world.Appearance], styles: Sequence[world.Style] = (world.ORDINARY,)):
        self.appearances = [appearance for _ in styles for appearance in appearances]
        self.styles = [style for style in styles for _ in appearances]
        self.colours = torch.from_numpy(np.stack([world.unit(colour) for colour in world.BACKGROUNDS.values()]))
        sprites = world.to_tensor([*map(world.sprite, self.appearances, self.styles)])
        # (5, A, 3 * 40 * 40): what each object adds to each background.
        self.added = torch.stack(
            [(sprites[:, 3:] * (sprites[:, :3] - colour.view(3, 1, 1))).flatten(1) for colour in self.colours]
        )

    def read(self, pictures: torch.Tensor) -> Reading:
        """Takes the background nearest to the median colour, then the pose and object with the least squared error."""
        median = pictures.flatten(2).median(-1).values
        backgrounds = torch.cdist(median, self.colours).argmin(1)
        difference = pictures - self.colours[backgrounds][..., None, None]
        windows = difference.unfold(2, world.OBJECT, world.TOKEN).unfold(3, world.OBJECT, world.TOKEN)
        rows, columns = zip(*world.POSES, strict=True)
        windows = windows[:, :, rows, columns].transpose(1, 2).flatten(2)  # (N, poses, 3 * 40 * 40)
        objects, poses, nearest = [], [], []
        for window, background in zip(windows, backgrounds.tolist(), strict=True):
            added = self.added[background]
            gains = 2 * window @ added.T - added.square().sum(1)  # (poses, A): how much an object reduces the error
            pose, index = divmod(int(gains.argmax()), len(self.appearances))
            objects.append(index)
            poses.append(pose)
            sprite = world.sprite(self.appearances[index], self.styles[index])
            nearest.append(world.draw(sprite, world.POSES[pose], list(world.BACKGROUNDS)[background]))
        return Reading(torch.tensor(objects), torch.tensor(poses), backgrounds, world.to_tensor(nearest))

    def accuracy(self, reading: Reading, wanted: list[world.Appearance], backgrounds: list[str]) -> dict[str, float]:
        """Shares of pictures with the wanted shape, texture, colours and background. "exact": the first three."""
        seen = [self.appearances[index] for index in reading.objects]
        names = list(world.BACKGROUNDS)
        return {
            "exact": _mean(a == b for a, b in zip(seen, wanted, strict=True)),
            "shape": _mean(a.shape == b.shape for a, b in zip(seen, wanted, strict=True)),
            "texture": _mean(a.texture == b.texture for a, b in zip(seen, wanted, strict=True)),
            "colours": _mean(a.colours == b.colours for a, b in zip(seen, wanted, strict=True)),
            "background": _mean(names[i] == name for i, name in zip(reading.backgrounds, backgrounds, strict=True)),
        }


def detail(pictures: torch.Tensor, reading: Reading) -> float:
    """Amplitude of the grain outside the object's square, relative to real pictures.

    1 for real pictures, less for blurred ones, more for noisy ones. Computed from the median difference of
    neighbouring 2x2 means, which ignores what few cells have, such as the edges of a second object.
    """
    cells = torch.nn.functional.avg_pool2d(pictures - reading.nearest, 2).mean(1)
    steps = (cells[:, :, 1:] - cells[:, :, :-1]).abs()
    amplitudes = []
    for step, pose in zip(steps, reading.poses, strict=True):
        is_outside = ~_object_square(pose)
        amplitudes.append(step[is_outside[:, 1:] & is_outside[:, :-1]].median().item())
    # The median of |difference| of two independent normal variables of deviation 1 is 0.6745 sqrt(2).
    return float(np.mean(amplitudes)) / (0.6745 * 2**0.5) / world.GRAIN_STD


def object_residual(pictures: torch.Tensor, reading: Reading) -> float:
    """Root mean square error of 2x2 means in the object's square, relative to the grain.

    The error is the difference from the nearest picture. 1 for real pictures, more for ragged outlines and for two
    objects drawn on top of each other.
    """
    cells = torch.nn.functional.avg_pool2d(pictures - reading.nearest, 2)
    squares = [cell[:, _object_square(pose)].square().mean() for cell, pose in zip(cells, reading.poses, strict=True)]
    return float(torch.stack(squares).mean().sqrt()) / world.GRAIN_STD


def _object_square(pose: torch.Tensor) -> torch.Tensor:
    """(32, 32), bool: which cells of 2x2 pixels are in the object's square."""
    top, left = (corner * world.TOKEN // 2 for corner in world.POSES[pose])
    is_inside = torch.zeros(world.SIDE // 2, world.SIDE // 2, dtype=torch.bool)
    is_inside[top : top + world.OBJECT // 2, left : left + world.OBJECT // 2] = True
    return is_inside


def effective_poses(reading: Reading) -> float:
    """Exponential of the entropy of the poses: how many places the objects are spread over."""
    share = torch.bincount(reading.poses, minlength=len(world.POSES)) / len(reading.poses)
    return float(torch.exp(-(share[share > 0] * share[share > 0].log()).sum()))


class RandomFeatures(torch.nn.Module):
    """Three random convolutions: features for a Frechet distance that does not depend on any training."""

    def __init__(self, width: int = 32):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        shapes = [(width, 3, 5, 5), (width, width, 5, 5), (width, width, 3, 3)]
        self.weights = [torch.randn(shape, generator=generator) * (2 / np.prod(shape[1:])) ** 0.5 for shape in shapes]

    @torch.no_grad()
    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        """(N, 3, 64, 64) -> (N, 2 * width): spatial mean and standard deviation of the last layer's maps."""
        for weight in self.weights:
            pictures = torch.nn.functional.conv2d(pictures, weight, stride=2, padding=2).relu()
        return torch.cat([pictures.mean((2, 3)), pictures.std((2, 3))], 1)


class LatentFeatures:
    """Features for a Frechet distance that also sees the grain, of which random ones see little."""

    def __init__(self, vae: AutoencoderKLFlux2):
        self.vae = vae

    @torch.no_grad()
    def __call__(self, pictures: torch.Tensor) -> torch.Tensor:
        """(N, 3, 64, 64) -> (N, 32): spatial mean and standard deviation of the latents' channels."""
        latents = self.vae.encode(pictures).latent_dist.mode()
        return torch.cat([latents.mean((2, 3)), latents.std((2, 3))], 1)


def frechet_distance(
    pictures: torch.Tensor, real: torch.Tensor, features: Callable[[torch.Tensor], torch.Tensor] | None = None
) -> float:
    """Frechet distance between the features of two sets of pictures (FID's formula, arXiv 1706.08500).

    Args:
        features: (N, 3, 64, 64) -> (N, D). Default: `RandomFeatures`.
    """
    features = features or RandomFeatures()
    first, second = features(pictures).double(), features(real).double()
    covariances = torch.cov(first.T), torch.cov(second.T)
    # trace((A B)^(1/2)) from the eigenvalues of A B, which are real and not negative.
    product = torch.linalg.eigvals(covariances[0] @ covariances[1]).real.clamp(min=0).sqrt().sum()
    distance = (first.mean(0) - second.mean(0)).square().sum() + sum(torch.trace(c) for c in covariances) - 2 * product
    return float(distance)


def _mean(values: Iterable[bool]) -> float:
    return float(np.mean(list(values)))
