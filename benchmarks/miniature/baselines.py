"""What D-OPSD is compared with: LoRAs of the same rank, data and steps, trained by other losses at other states.

- `sft`: flow matching on the pictures, as diffusers' training scripts do it.
- `sft_deployed`: the same, but only at the sigmas that sampling visits.
- `sft_teacher`: flow matching on what the teacher samples, where it sees the pictures.
- `off_policy`: D-OPSD's loss, at the states of the teacher's own trajectory.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from PIL import Image

from pipelines.adapters import StudentTeacherLoRA
from pipelines.flux2_klein import Flux2KleinDOPSDPipeline, KleinContext
from pipelines.rollout import Schedule, VelocityFunction, distillation_loss, euler_step, few_step_sample, seeded_noise


MAX_TIMESTEP = 1000  # the scheduler's scale: timestep = 1000 sigma


@dataclass(frozen=True)
class Lesson:
    """The pictures of one concept, encoded.

    Attributes:
        student: the captions' context.
        teacher: the captions with the suffix, and each one's picture as reference.
        x0: (N, C, h, w), the pictures' own latents, as the transformer has them.
    """

    student: KleinContext
    teacher: KleinContext
    x0: torch.Tensor


def encode_lesson(
    pipeline: Flux2KleinDOPSDPipeline,
    pictures: list[Image.Image],
    captions: list[str],
    *,
    prompt_suffix: str,
    max_sequence_length: int,
) -> Lesson:
    student = pipeline.encode_student(captions, max_sequence_length=max_sequence_length)
    teacher = pipeline.encode_teacher(
        captions, pictures, prompt_suffix=prompt_suffix, max_sequence_length=max_sequence_length
    )
    return Lesson(student, teacher, teacher.references[0])


def flow_matching_loss(
    student: VelocityFunction, x0: torch.Tensor, generator: torch.Generator, *, sigmas: torch.Tensor | None = None
) -> torch.Tensor:
    """MSE(v(x_sigma), noise - x0) at x_sigma = (1 - sigma) x0 + sigma noise.

    As diffusers' DreamBooth LoRA scripts do with `--weighting_scheme none`. arXiv 2210.02747, Eq. 14.

    Args:
        sigmas: each sample's sigma is one of these; None: uniform from 0 to 1.
    """
    noise = torch.randn(x0.shape, generator=generator)
    if sigmas is None:
        sigma = torch.rand(len(x0), generator=generator)
    else:
        sigma = sigmas[torch.randint(len(sigmas), (len(x0),), generator=generator)]
    weight = sigma.view(-1, 1, 1, 1)
    velocity = student((1 - weight) * x0 + weight * noise, sigma * MAX_TIMESTEP)
    return torch.nn.functional.mse_loss(velocity, noise - x0)


def off_policy_losses(
    student: VelocityFunction, teacher: VelocityFunction, noise: torch.Tensor, schedule: Schedule
) -> Iterator[torch.Tensor]:
    """D-OPSD's loss per state in x0, but at the states to which the teacher's steps lead."""
    latents = noise
    for index, timestep in enumerate(schedule.timesteps):
        sigma, next_sigma = schedule.sigmas[index], schedule.sigmas[index + 1]
        velocity = teacher(latents, timestep)
        yield distillation_loss(student(latents, timestep), velocity, sigma, loss_space="x0")
        latents = euler_step(latents, velocity, sigma, next_sigma)


def train_baseline(
    method: str,
    pipeline: Flux2KleinDOPSDPipeline,
    roles: StudentTeacherLoRA,
    lesson: Lesson,
    *,
    size: tuple[int, int],
    num_steps: int,
    num_rollout_steps: int,
    learning_rate: float,
    ema_decay: float,
    seed: int,
    after_step: Callable[[int], bool] = lambda step: False,
) -> None:
    """Every step sees every picture once, as `train_dopsd_flux2.py` does with a batch of all pictures.

    Args:
        method: "sft", "sft_deployed", "sft_teacher" or "off_policy".
        size: (height, width) in pixels.
        after_step: told the number of steps done; True stops.
    """
    optimizer = torch.optim.AdamW(roles.student_parameters, lr=learning_rate, weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed)
    schedule = pipeline.schedule(*size, num_rollout_steps)

    def student(latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return pipeline.predict_velocity(latents, timestep, lesson.student)

    teacher = roles.as_teacher(lambda latents, timestep: pipeline.predict_velocity(latents, timestep, lesson.teacher))
    for step in range(num_steps):
        if method in ("sft", "sft_deployed"):
            sigmas = schedule.sigmas[:-1] if method == "sft_deployed" else None
            losses = [flow_matching_loss(student, lesson.x0, generator, sigmas=sigmas)]
        else:
            seeds = torch.randint(2**62, (len(lesson.x0),), generator=generator).tolist()
            noise = seeded_noise(pipeline.latent_shape(*size), seeds)
            if method == "sft_teacher":
                x0 = few_step_sample(teacher, noise, schedule)
                losses = [flow_matching_loss(student, x0, generator)]
            else:
                losses = (loss / len(schedule) for loss in off_policy_losses(student, teacher, noise, schedule))
        for loss in losses:
            loss.backward()
        torch.nn.utils.clip_grad_norm_(roles.student_parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        roles.update_teacher(ema_decay)
        if after_step(step + 1):
            return
