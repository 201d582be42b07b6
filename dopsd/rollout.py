"""The on-policy rollout of D-OPSD and its loss per visited state. Knows no model.

Convention: sigma runs from 1 (noise) to 0 (clean), velocity = noise - x0, x0 = x - sigma * velocity.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch


LossSpace = Literal["x0", "velocity"]
# (latents, timestep) -> velocity, of the latents' shape; context, weights and model conventions are inside.
VelocityFunction = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Schedule:
    """The deployed sampler's steps, as its scheduler computed them.

    Attributes:
        sigmas: (K + 1,), float32, from 1 (noise) down to the closing 0.
        timesteps: (K,), float32, in the scheduler's own scale: what the model's time is made from.
    """

    sigmas: torch.Tensor
    timesteps: torch.Tensor

    def __len__(self) -> int:
        return len(self.timesteps)


@dataclass(frozen=True)
class RolloutStep:
    """One visited state.

    Attributes:
        index: 0 at pure noise, K - 1 at the last state.
        sigma: scalar tensor, the state's noise level.
        latents: the state, (B, ...), detached.
        student_velocity: (B, ...), with the student's graph.
        teacher_velocity: (B, ...), a constant.
        loss: scalar float32 tensor of this state alone, with the student's graph.
        next_latents: where the student's step leads, (B, ...), detached.
    """

    index: int
    sigma: torch.Tensor
    latents: torch.Tensor
    student_velocity: torch.Tensor
    teacher_velocity: torch.Tensor
    loss: torch.Tensor
    next_latents: torch.Tensor

    @property
    def student_x0(self) -> torch.Tensor:
        """The clean latents that the student implies at this state, (B, ...)."""
        return self.latents - self.sigma * self.student_velocity.detach()

    @property
    def teacher_x0(self) -> torch.Tensor:
        return self.latents - self.sigma * self.teacher_velocity

    @property
    def agreement(self) -> torch.Tensor:
        """(2,), float32: cosine of the two velocities, and the student's norm over the teacher's; batch means."""
        student = self.student_velocity.detach().float().flatten(1)
        teacher = self.teacher_velocity.float().flatten(1)
        cosine = torch.nn.functional.cosine_similarity(student, teacher).mean()
        return torch.stack([cosine, (student.norm(dim=1) / teacher.norm(dim=1)).mean()])


def euler_step(
    latents: torch.Tensor, velocity: torch.Tensor, sigma: torch.Tensor, next_sigma: torch.Tensor
) -> torch.Tensor:
    """x + (next_sigma - sigma) * velocity, rounded as `FlowMatchEulerDiscreteScheduler.step` rounds it."""
    return (latents.float() + (next_sigma - sigma) * velocity).to(velocity.dtype)


def distillation_loss(
    student_velocity: torch.Tensor, teacher_velocity: torch.Tensor, sigma: torch.Tensor, *, loss_space: LossSpace
) -> torch.Tensor:
    """Mean squared distance of student and teacher at one state, in float32.

    "velocity" is D-OPSD's Eq. 7 (arXiv 2605.05204). "x0" compares the clean latents that both imply,
    x - sigma * v, which is sigma^2 times as much: what the published runs minimised.
    """
    difference = student_velocity.float() - teacher_velocity.float()
    if loss_space == "x0":
        difference = sigma * difference
    return difference.square().mean()


def rollout(
    student: VelocityFunction,
    teacher: VelocityFunction,
    noise: torch.Tensor,
    schedule: Schedule,
    *,
    loss_space: LossSpace = "x0",
) -> Iterator[RolloutStep]:
    """Walks the student's own few-step trajectory; the teacher answers at every state the student visits.

    Method of arXiv 2605.05204: x_{k-1} = x_k + (sigma_{k-1} - sigma_k) v_student(x_k), every x_k detached, so each
    state's loss may be backwarded as soon as it is yielded. That gives the gradient of the summed loss with the
    activation memory of a single state.

    Args:
        student: its velocity carries the gradient. Called after the teacher, so that the teacher's activations are
            gone before the student's graph is built.
        teacher: must return a constant (see `StudentTeacherLoRA.as_teacher`).
        noise: (B, ...), the state at sigma = 1.
        schedule: the deployed sampler's K steps.
        loss_space: see `distillation_loss`.

    Yields:
        K steps, from noise to the last state.
    """
    latents = noise
    for index, timestep in enumerate(schedule.timesteps):
        sigma, next_sigma = schedule.sigmas[index], schedule.sigmas[index + 1]
        teacher_velocity = teacher(latents, timestep)
        assert not teacher_velocity.requires_grad, "the teacher's velocity must be a constant"
        student_velocity = student(latents, timestep)
        next_latents = euler_step(latents, student_velocity.detach(), sigma, next_sigma)
        yield RolloutStep(
            index=index,
            sigma=sigma,
            latents=latents,
            student_velocity=student_velocity,
            teacher_velocity=teacher_velocity,
            loss=distillation_loss(student_velocity, teacher_velocity, sigma, loss_space=loss_space),
            next_latents=next_latents,
        )
        latents = next_latents


@torch.no_grad()
def few_step_sample(velocity: VelocityFunction, noise: torch.Tensor, schedule: Schedule) -> torch.Tensor:
    """Where the deployed sampler's K steps lead from the noise: (B, ...), as the transformer has its latents."""
    latents = noise
    for index, timestep in enumerate(schedule.timesteps):
        sigma, next_sigma = schedule.sigmas[index], schedule.sigmas[index + 1]
        latents = euler_step(latents, velocity(latents, timestep), sigma, next_sigma)
    return latents


def seeded_noise(shape: tuple[int, ...], seeds: list[int]) -> torch.Tensor:
    """Standard normal noise, one sample a seed: (len(seeds), *shape), float32, on the CPU.

    Each sample has its own generator, so it depends on its seed alone: not on the batch, process or device.
    """
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
