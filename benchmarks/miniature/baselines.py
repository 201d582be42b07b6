"""What D-OPSD is compared with: LoRAs of the same rank, data and steps, trained by other losses at other states.

- `sft`: flow matching on the pictures, as diffusers' training scripts do it.
- `sft_deployed`: the same, but only at the sigmas that sampling visits.
- `sft_teacher`: flow matching on what the teacher samples, where it sees the pictures.
- `off_policy`: D-OPSD's loss, at the states of the teacher's own trajectory.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

import torch
from diffusers.optimization import get_scheduler
from PIL import Image

from dopsd.roles import StudentTeacherLoRA
from dopsd.rollout import Schedule, VelocityFunction, distillation_loss, euler_step, few_step_sample, seeded_noise
from pipelines.flux2_klein import Flux2KleinDOPSDPipeline, KleinContext


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

    def select(self, indices: torch.Tensor) -> "Lesson":
        """Some of the pictures."""
        (references,) = self.teacher.references
        return Lesson(
            KleinContext(self.student.prompt_embeds[indices]),
            KleinContext(self.teacher.prompt_embeds[indices], (references[indices],)),
            self.x0[indices],
        )


def picture_batches(count: int, batch_size: int, seed: int) -> Iterator[torch.Tensor]:
    """Indices of pictures without end: every epoch sees each picture once, in a new order; a batch's ascend."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        for indices in torch.randperm(count, generator=generator).split(batch_size):
            yield indices.sort().values


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
    batch_size: int,
    num_rollout_steps: int,
    learning_rate: float,
    adam_epsilon: float,
    lr_scheduler: str,
    lr_warmup_steps: int,
    ema_decay: float,
    seed: int,
    after_step: Callable[[int], bool] = lambda step: False,
) -> None:
    """Trains the student's adapter: AdamW, clipping and learning rate as in `train_dopsd_flux2.py`.

    A step sees as many states as one of D-OPSD: `num_rollout_steps` of each picture of its batch.

    Args:
        method: "sft", "sft_deployed", "sft_teacher" or "off_policy".
        size: (height, width) in pixels.
        batch_size: pictures a step.
        after_step: told the number of steps done; True stops.
    """
    optimizer = torch.optim.AdamW(roles.student_parameters, lr=learning_rate, eps=adam_epsilon, weight_decay=0.0)
    scheduler = get_scheduler(lr_scheduler, optimizer, num_warmup_steps=lr_warmup_steps, num_training_steps=num_steps)
    generator = torch.Generator().manual_seed(seed)
    schedule = pipeline.schedule(*size, num_rollout_steps)

    def student(latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return pipeline.predict_velocity(latents, timestep, batch.student)

    teacher = roles.as_teacher(lambda latents, timestep: pipeline.predict_velocity(latents, timestep, batch.teacher))
    batches = picture_batches(len(lesson.x0), batch_size, seed)
    for step, indices in enumerate(islice(batches, num_steps)):
        batch = lesson.select(indices)
        if method in ("sft", "sft_deployed"):
            sigmas = schedule.sigmas[:-1] if method == "sft_deployed" else None
            losses = (flow_matching_loss(student, batch.x0, generator, sigmas=sigmas) for _ in schedule.timesteps)
        else:
            seeds = torch.randint(2**62, (len(batch.x0),), generator=generator).tolist()
            noise = seeded_noise(pipeline.latent_shape(*size), seeds)
            if method == "sft_teacher":
                x0 = few_step_sample(teacher, noise, schedule)
                losses = (flow_matching_loss(student, x0, generator) for _ in schedule.timesteps)
            else:
                losses = off_policy_losses(student, teacher, noise, schedule)
        for loss in losses:
            (loss / len(schedule)).backward()
        torch.nn.utils.clip_grad_norm_(roles.student_parameters, 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        roles.update_teacher(ema_decay)
        if after_step(step + 1):
            return
