"""Rivals whose losses `baselines` does not have: off-policy from cached trajectories, and delta transfer."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
from diffusers import DiffusionPipeline

from benchmarks.miniature.architecture import Architecture, Context
from benchmarks.miniature.baselines import BaselineTraining, EncodedPictures, drawn_noise, one_state_loss
from dopsd.rollout import Schedule, VelocityFunction, distillation_loss, euler_step


RECORDED_AT_ONCE = 64


@dataclass(frozen=True)
class Trajectories:
    """N few-step trajectories of a frozen model, and its velocities there.

    Attributes:
        contexts: the student's, of the distinct prompts.
        places: (N,), the index of each trajectory's context.
        states, velocities: (N, K, C, h, w).
    """

    contexts: Context
    places: torch.Tensor
    states: torch.Tensor
    velocities: torch.Tensor

    def losses(
        self,
        architecture: Architecture,
        pipeline: DiffusionPipeline,
        schedule: Schedule,
        chosen: torch.Tensor,
        indices: Iterable[int],
    ) -> Iterable[torch.Tensor]:
        """D-OPSD's x0 loss at these states of the chosen trajectories."""
        context = architecture.select(self.contexts, self.places[chosen])
        for index in indices:
            student = pipeline.predict_velocity(self.states[chosen, index], schedule.timesteps[index], context)
            velocity = self.velocities[chosen, index]
            yield distillation_loss(student, velocity, schedule.sigmas[index], loss_space="x0")


@torch.no_grad()
def record(
    velocity_of: Callable[[torch.Tensor], VelocityFunction],
    noise: torch.Tensor,
    schedule: Schedule,
    contexts: Context,
    places: torch.Tensor,
) -> Trajectories:
    """The trajectories of a frozen model.

    Args:
        velocity_of: (indices of trajectories) -> the model's velocity function with their contexts.
        noise: (N, C, h, w).
        contexts, places: the student's, see `Trajectories`.
    """
    states, velocities = [], []
    for part in torch.arange(len(noise)).split(RECORDED_AT_ONCE):
        velocity_function, latents, path = velocity_of(part), noise[part], []
        for index, timestep in enumerate(schedule.timesteps):
            velocity = velocity_function(latents, timestep)
            path.append((latents, velocity))
            latents = euler_step(latents, velocity, schedule.sigmas[index], schedule.sigmas[index + 1])
        states.append(torch.stack([state for state, _ in path], 1))
        velocities.append(torch.stack([velocity for _, velocity in path], 1))
    return Trajectories(contexts, places, torch.cat(states), torch.cat(velocities))


class OffPolicyPriorTraining(BaselineTraining):
    """Holds the student to the teacher on the teacher's trajectories, and to the base on the base's. All are cached.

    Args:
        taught: the teacher's trajectories of the concept's captions.
        held: the base's, of the prompts of prior preservation.
        has_one_state: one state of each trajectory per step, drawn uniformly, instead of all.
    """

    def __init__(
        self,
        architecture: Architecture,
        taught: Trajectories,
        held: Trajectories,
        *arguments: object,
        has_one_state: bool,
        **options: object,
    ):
        super().__init__("off_policy", *arguments, **options)
        self.architecture, self.taught, self.held, self.has_one_state = architecture, taught, held, has_one_state

    def backpropagate(self, batch: EncodedPictures) -> None:
        for trajectories in (self.taught, self.held):
            chosen = torch.randint(len(trajectories.states), (len(batch.x0),), generator=self.generator)
            indices = range(len(self.schedule))
            if self.has_one_state:
                indices = torch.randint(len(self.schedule), (1,), generator=self.generator).tolist()
            for loss in trajectories.losses(self.architecture, self.pipeline, self.schedule, chosen, indices):
                (loss / len(indices)).backward()


@dataclass(frozen=True)
class ManyStepChange:
    """What a concept's LoRA changes in the many-step model that it was trained on.

    Attributes:
        before, after: the many-step model without and with the LoRA, frozen.
        scale: of the change.
    """

    before: DiffusionPipeline
    after: DiffusionPipeline
    scale: float = 1.0

    def target(self, base: VelocityFunction, context: Context) -> VelocityFunction:
        """v_base + scale (v_after - v_before), without a graph: what delta transfer teaches the few-step model."""

        @torch.no_grad()
        def velocity(latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            after = self.after.predict_velocity(latents, timestep, context)
            before = self.before.predict_velocity(latents, timestep, context)
            return base(latents, timestep) + self.scale * (after - before)

        return velocity


class DeltaTraining(BaselineTraining):
    """Teaches a many-step model's change at one state of the student's own trajectory per step.

    Args:
        change: of the concept's LoRA.
        held: encoded prompts on which the student is held to the base, at its own states; None for no prior.
    """

    def __init__(
        self,
        architecture: Architecture,
        change: ManyStepChange,
        held: Context | None,
        *arguments: object,
        num_held: int,
        **options: object,
    ):
        super().__init__("one_state", *arguments, **options)
        self.architecture, self.change, self.held, self.num_held = architecture, change, held, num_held

    def backpropagate(self, batch: EncodedPictures) -> None:
        base = self.roles.as_base(self.velocity(batch.student))
        self._backpropagate_one_state(batch.student, self.change.target(base, batch.student), batch.x0)
        if self.held is not None:
            chosen = torch.randint(self.num_held, (len(batch.x0),), generator=self.generator)
            context = self.architecture.select(self.held, chosen)
            self._backpropagate_one_state(context, self.roles.as_base(self.velocity(context)), batch.x0)

    def _backpropagate_one_state(self, context: Context, teacher: VelocityFunction, like: torch.Tensor) -> None:
        state = int(torch.randint(len(self.schedule), (), generator=self.generator))
        noise = drawn_noise(like, self.generator)
        student = partial(self.pipeline.predict_velocity, context=context)
        one_state_loss(student, teacher, noise, self.schedule, state).backward()
