"""The methods that D-OPSD is compared with: LoRAs of the same rank, data and steps, trained with other losses.

- `sft`: flow matching on the training pictures, as in diffusers' training scripts.
- `sft_deployed`: the same, but only at the sigmas that the deployed sampler visits.
- `sft_teacher`: flow matching on samples of the teacher, which sees the training pictures.
- `off_policy`: D-OPSD's loss at the states of the teacher's trajectory instead of the student's.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice

import torch
from diffusers.optimization import get_scheduler
from PIL import Image

from benchmarks.miniature.methods import SharedSettings
from dopsd.roles import StudentTeacherLoRA
from dopsd.rollout import Schedule, VelocityFunction, distillation_loss, euler_step, few_step_sample, seeded_noise
from pipelines.flux2_klein import Flux2KleinDOPSDPipeline, KleinContext


MAX_TIMESTEP = 1000  # in the scheduler's scale: timestep = 1000 sigma


@dataclass(frozen=True)
class EncodedPictures:
    """The N encoded training pictures of one concept.

    Attributes:
        student: encoded captions.
        teacher: encoded captions with the suffix, and each picture as its own reference.
        x0: (N, C, h, w), latents of the pictures, patchified and normalised.
    """

    student: KleinContext
    teacher: KleinContext
    x0: torch.Tensor

    def select(self, indices: torch.Tensor) -> "EncodedPictures":
        """The pictures with these indices."""
        (references,) = self.teacher.references
        return EncodedPictures(
            KleinContext(self.student.prompt_embeds[indices]),
            KleinContext(self.teacher.prompt_embeds[indices], (references[indices],)),
            self.x0[indices],
        )


def encode_pictures(
    pipeline: Flux2KleinDOPSDPipeline,
    pictures: list[Image.Image],
    captions: list[str],
    *,
    prompt_suffix: str,
    max_sequence_length: int,
) -> EncodedPictures:
    student = pipeline.encode_student(captions, max_sequence_length=max_sequence_length)
    teacher = pipeline.encode_edit_teacher(
        captions, pictures, prompt_suffix=prompt_suffix, max_sequence_length=max_sequence_length
    )
    return EncodedPictures(student, teacher, teacher.references[0])


def batch_indices(count: int, batch_size: int, seed: int) -> Iterator[torch.Tensor]:
    """Endless batches of picture indices, in ascending order. Each epoch contains every picture once."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        for indices in torch.randperm(count, generator=generator).split(batch_size):
            yield indices.sort().values


def flow_matching_loss(
    student: VelocityFunction, x0: torch.Tensor, generator: torch.Generator, *, sigmas: torch.Tensor | None = None
) -> torch.Tensor:
    """MSE(v(x_sigma), noise - x0) at x_sigma = (1 - sigma) x0 + sigma noise (arXiv 2210.02747, Eq. 14).

    The same as diffusers' DreamBooth LoRA scripts with `--weighting_scheme none`.

    Args:
        x0: (B, C, h, w).
        sigmas: each sample's sigma is drawn from these; None: uniformly from 0 to 1.
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
    """D-OPSD's x0 loss at each of the K states that the teacher's steps visit, starting from noise (B, C, h, w)."""
    latents = noise
    for index, timestep in enumerate(schedule.timesteps):
        sigma, next_sigma = schedule.sigmas[index], schedule.sigmas[index + 1]
        velocity = teacher(latents, timestep)
        yield distillation_loss(student(latents, timestep), velocity, sigma, loss_space="x0")
        latents = euler_step(latents, velocity, sigma, next_sigma)


def step_losses(
    method: str,
    student: VelocityFunction,
    teacher: VelocityFunction,
    x0: torch.Tensor,
    schedule: Schedule,
    generator: torch.Generator,
) -> Iterator[torch.Tensor]:
    """The losses of one training step: K of them, so that every method sees as many states as D-OPSD.

    Args:
        method: "sft", "sft_deployed", "sft_teacher" or "off_policy".
        x0: (B, C, h, w), latents of the batch's pictures.
    """
    sigmas = None
    if method == "sft_deployed":
        sigmas = schedule.sigmas[:-1]
    elif method != "sft":
        seeds = torch.randint(2**62, (len(x0),), generator=generator).tolist()
        noise = seeded_noise(x0.shape[1:], seeds)
        if method == "off_policy":
            yield from off_policy_losses(student, teacher, noise, schedule)
            return
        assert method == "sft_teacher", method
        x0 = few_step_sample(teacher, noise, schedule)
    for _ in schedule.timesteps:
        yield flow_matching_loss(student, x0, generator, sigmas=sigmas)


def build_optimizer(
    parameters: list[torch.nn.Parameter], settings: SharedSettings, num_steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """Optimizer and learning-rate scheduler of `train_dopsd_flux2.py`."""
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, eps=settings.adam_epsilon, weight_decay=0.0)
    scheduler = get_scheduler(
        settings.lr_scheduler,
        optimizer,
        num_warmup_steps=settings.lr_warmup_steps,
        num_training_steps=num_steps,
    )
    return optimizer, scheduler


def train_baseline(
    method: str,
    pipeline: Flux2KleinDOPSDPipeline,
    roles: StudentTeacherLoRA,
    pictures: EncodedPictures,
    schedule: Schedule,
    settings: SharedSettings,
    *,
    num_steps: int,
    seed: int,
    should_stop: Callable[[int], bool] | None = None,
) -> int:
    """Trains the student's adapter, with gradients clipped as in `train_dopsd_flux2.py`.

    Args:
        method: see `step_losses`.
        schedule: the K steps of the deployed sampler.
        should_stop: called after every step with the number of steps so far.

    Returns:
        The number of training steps.
    """
    optimizer, scheduler = build_optimizer(roles.student_parameters, settings, num_steps)
    generator = torch.Generator().manual_seed(seed)
    batches = batch_indices(len(pictures.x0), settings.train_batch_size, seed)
    for step, indices in enumerate(islice(batches, num_steps), start=1):
        batch = pictures.select(indices)
        student = partial(pipeline.predict_velocity, context=batch.student)
        teacher = roles.as_teacher(partial(pipeline.predict_velocity, context=batch.teacher))
        for loss in step_losses(method, student, teacher, batch.x0, schedule, generator):
            (loss / len(schedule)).backward()
        torch.nn.utils.clip_grad_norm_(roles.student_parameters, 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        roles.update_teacher(settings.ema_decay)
        if should_stop is not None and should_stop(step):
            return step
    return num_steps
