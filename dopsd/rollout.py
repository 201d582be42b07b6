"""The on-policy rollout of D-OPSD and its loss at each visited state. Works with any model.

Convention: sigma goes from 1 (noise) to 0 (clean), velocity = noise - x0, x0 = x - sigma * velocity.
"""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Literal

import torch


LossSpace = Literal["x0", "velocity"]
# (latents, timestep) -> velocity, with the shape of the latents. It binds the context, the weights and the model's
# own conventions.
VelocityFunction = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Schedule:
    """The steps of the deployed sampler, as its scheduler computed them.

    Attributes:
        sigmas: (K + 1,), float32, from 1 (noise) down to the final 0.
        timesteps: (K,), float32, in the scheduler's own scale; the model's time input is computed from them.
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
        sigma: noise level of the state, a scalar tensor.
        latents: the state, (B, ...), detached.
        student_velocity: (B, ...), attached to the student's graph.
        teacher_velocity: (B, ...), without a graph.
        loss: loss at this state alone, a scalar float32 tensor attached to the student's graph.
        next_latents: the state after the student's step, (B, ...), detached.
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
        """The clean latents that the student predicts from this state, (B, ...), detached."""
        return self.latents - self.sigma * self.student_velocity.detach()

    @property
    def teacher_x0(self) -> torch.Tensor:
        """The clean latents that the teacher predicts from this state, (B, ...)."""
        return self.latents - self.sigma * self.teacher_velocity

    @property
    def agreement(self) -> torch.Tensor:
        """(2,), float32: cosine similarity of the velocities and norm ratio student / teacher, averaged over B."""
        student = self.student_velocity.detach().float().flatten(1)
        teacher = self.teacher_velocity.float().flatten(1)
        cosine = torch.nn.functional.cosine_similarity(student, teacher).mean()
        return torch.stack([cosine, (student.norm(dim=1) / teacher.norm(dim=1)).mean()])


def euler_step(
    latents: torch.Tensor, velocity: torch.Tensor, sigma: torch.Tensor, next_sigma: torch.Tensor
) -> torch.Tensor:
    """x + (next_sigma - sigma) * velocity, with the same rounding as `FlowMatchEulerDiscreteScheduler.step`."""
    return (latents.float() + (next_sigma - sigma) * velocity).to(velocity.dtype)


def distillation_loss(
    student_velocity: torch.Tensor, teacher_velocity: torch.Tensor, sigma: torch.Tensor, *, loss_space: LossSpace
) -> torch.Tensor:
    """Mean squared error between student and teacher at one state, computed in float32.

    "velocity" is Eq. 7 of D-OPSD (arXiv 2605.05204). "x0" compares the predicted clean latents x - sigma * v, which
    multiplies the loss by sigma^2; the published runs minimised this one.

    Args:
        student_velocity, teacher_velocity: (B, ...).
        sigma: noise level of the state, a scalar tensor.

    Returns:
        A scalar tensor.
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
    trained: Collection[int] | None = None,
    loss_space: LossSpace = "x0",
    batches_teacher: bool = False,
    visits_all: bool = False,
) -> Iterator[RolloutStep]:
    """Follows the student's few-step trajectory and evaluates the teacher at states on it (arXiv 2605.05204).

    The student takes the sampler's Euler steps, x_{i+1} = x_i + (sigma_{i+1} - sigma_i) * v_student(x_i). Every x_i is
    detached, so each loss can be backpropagated as soon as it is yielded: the gradients are those of the summed loss,
    and only one state's activations are in memory.

    Args:
        student: its velocity carries the gradient. Called after the teacher, whose activations are freed before the
            student's graph is built.
        teacher: must return a tensor without a graph (see `Roles.as_teacher`).
        noise: (B, ...), the state at sigma = 1.
        schedule: the K steps of the deployed sampler.
        trained: indices of the states to yield, at least one. The student passes the others without a gradient or a
            teacher, and stops after the last of them. Default: all.
        loss_space: see `distillation_loss`.
        batches_teacher: call the teacher once, for all trained states in one batch: (num_trained * B, ...), with a
            timestep per sample. For a teacher whose weights come from elsewhere at each call. The student first walks
            the states without a gradient, one more forward per trained state.
        visits_all: with `batches_teacher`, walk all states, so that the number of calls does not depend on `trained`.

    Yields:
        The trained states, the noisiest first.
    """
    if batches_teacher:
        yield from rollout_with_batched_teacher(
            student, teacher, noise, schedule, trained=trained, loss_space=loss_space, visits_all=visits_all
        )
        return
    trained = range(len(schedule)) if trained is None else trained
    latents = noise
    for index, timestep in enumerate(schedule.timesteps[: max(trained) + 1]):
        sigma, next_sigma = schedule.sigmas[index], schedule.sigmas[index + 1]
        if index not in trained:
            with torch.no_grad():
                latents = euler_step(latents, student(latents, timestep), sigma, next_sigma)
            continue
        teacher_velocity = teacher(latents, timestep)
        state = rollout_step(student, teacher_velocity, latents, schedule, index, loss_space=loss_space)
        yield state
        latents = state.next_latents


def rollout_with_batched_teacher(
    student: VelocityFunction,
    teacher: VelocityFunction,
    noise: torch.Tensor,
    schedule: Schedule,
    *,
    trained: Collection[int] | None,
    loss_space: LossSpace,
    visits_all: bool,
) -> Iterator[RolloutStep]:
    """See `rollout` with `batches_teacher`."""
    trained = sorted(range(len(schedule)) if trained is None else trained)
    visited, latents = [], noise
    with torch.no_grad():
        for index in range(len(schedule) if visits_all else trained[-1] + 1):
            visited.append(latents)
            if visits_all or index < trained[-1]:
                velocity = student(latents, schedule.timesteps[index])
                latents = euler_step(latents, velocity, schedule.sigmas[index], schedule.sigmas[index + 1])
    timesteps = schedule.timesteps[trained].repeat_interleave(len(noise))
    velocities = teacher(torch.cat([visited[index] for index in trained]), timesteps).chunk(len(trained))
    for index, velocity in zip(trained, velocities, strict=True):
        yield rollout_step(student, velocity, visited[index], schedule, index, loss_space=loss_space)


def rollout_step(
    student: VelocityFunction,
    teacher_velocity: torch.Tensor,
    latents: torch.Tensor,
    schedule: Schedule,
    index: int,
    *,
    loss_space: LossSpace,
) -> RolloutStep:
    """The student, with a gradient, at a state whose teacher velocity is known."""
    assert not teacher_velocity.requires_grad, "the teacher's velocity must not require a gradient"
    sigma, next_sigma = schedule.sigmas[index], schedule.sigmas[index + 1]
    student_velocity = student(latents, schedule.timesteps[index])
    return RolloutStep(
        index=index,
        sigma=sigma,
        latents=latents,
        student_velocity=student_velocity,
        teacher_velocity=teacher_velocity,
        loss=distillation_loss(student_velocity, teacher_velocity, sigma, loss_space=loss_space),
        next_latents=euler_step(latents, student_velocity.detach(), sigma, next_sigma),
    )


@torch.no_grad()
def few_step_sample(velocity: VelocityFunction, noise: torch.Tensor, schedule: Schedule) -> torch.Tensor:
    """Samples with the K Euler steps of the schedule.

    Args:
        noise: (B, ...), the state at sigma = 1.

    Returns:
        The state at sigma = 0, (B, ...).
    """
    latents = noise
    for index, timestep in enumerate(schedule.timesteps):
        sigma, next_sigma = schedule.sigmas[index], schedule.sigmas[index + 1]
        latents = euler_step(latents, velocity(latents, timestep), sigma, next_sigma)
    return latents


def seeded_noise(shape: tuple[int, ...], seeds: list[int]) -> torch.Tensor:
    """Standard normal noise with one sample per seed, (len(seeds), *shape), float32, on the CPU.

    Each sample has its own generator, so it depends on its seed only, not on the batch, the process or the device.
    """
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
