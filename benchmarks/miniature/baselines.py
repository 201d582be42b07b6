"""The methods that D-OPSD is compared with: the same weights, data and steps, trained with other losses.

- `sft`: flow matching on the training pictures, as in diffusers' training scripts, which draw sigmas with the
  scheduler's own shift, or uniformly if that depends on the size of the picture.
- `sft_deployed`: the same, but only at the sigmas that the deployed sampler visits.
- `sft_teacher`: flow matching on samples of the teacher, which sees the training pictures.
- `sft_prior`: flow matching on the training pictures and, as in DreamBooth (arXiv 2208.12242), on as many pictures
  that the base drew beforehand, of the prompts on which D-OPSD's prior preservation holds the student.
- `off_policy`: D-OPSD's loss at the states of the teacher's trajectory instead of the student's.
- `one_state`, `one_state_by_norm`: D-OPSD's loss at one state of the student's trajectory, drawn uniformly or in
  proportion to the norm of its gradient.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice

import torch
from diffusers import DiffusionPipeline
from diffusers.optimization import get_scheduler
from PIL import Image

from benchmarks.miniature import world
from benchmarks.miniature.architecture import Context
from benchmarks.miniature.architectures import architecture_of
from benchmarks.miniature.methods import SharedSettings
from dopsd.data.order import place_seed
from dopsd.roles import Roles
from dopsd.rollout import (
    Schedule,
    VelocityFunction,
    distillation_loss,
    euler_step,
    few_step_sample,
    rollout,
    seeded_noise,
)


MAX_TIMESTEP = 1000  # in the scheduler's scale: timestep = 1000 sigma


@dataclass(frozen=True)
class EncodedPictures:
    """The N encoded training pictures of one concept.

    Attributes:
        student: encoded captions; for an editor also the pictures to edit.
        teacher: encoded captions with the suffix, and each picture as its own reference, the last one.
        x0: (N, C, h, w), latents of the pictures, as the pipeline samples them.
    """

    student: Context
    teacher: Context
    x0: torch.Tensor

    def select(self, indices: torch.Tensor) -> "EncodedPictures":
        """The pictures with these indices."""
        return EncodedPictures(selected(self.student, indices), selected(self.teacher, indices), self.x0[indices])


@dataclass(frozen=True)
class PriorPictures:
    """N pictures that the base drew.

    Attributes:
        context: encoded prompts.
        x0: (N, C, h, w), latents.
    """

    context: Context
    x0: torch.Tensor

    def draw(self, count: int, generator: torch.Generator) -> "PriorPictures":
        indices = torch.randint(len(self.x0), (count,), generator=generator)
        return PriorPictures(selected(self.context, indices), self.x0[indices])


def selected(context: Context, indices: torch.Tensor) -> Context:
    """The samples with these indices."""
    return architecture_of(context).select(context, indices)


@torch.no_grad()
def draw_prior_pictures(
    pipeline: DiffusionPipeline, prompts: list[str], schedule: Schedule, *, seed: int
) -> PriorPictures:
    """One picture for each prompt. The pipeline must be the base model's."""
    context = architecture_of(pipeline).text_context(pipeline, prompts)
    seeds = [place_seed(seed, "prior pictures", str(index)) for index in range(len(prompts))]
    noise = seeded_noise(pipeline.latent_shape(world.SIDE, world.SIDE), seeds)
    return PriorPictures(
        context, few_step_sample(partial(pipeline.predict_velocity, context=context), noise, schedule)
    )


def encode_pictures(
    pipeline: DiffusionPipeline, pictures: list[Image.Image], captions: list[str], *, prompt_suffix: str
) -> EncodedPictures:
    architecture = architecture_of(pipeline)
    prompts = [caption + prompt_suffix for caption in captions]
    return EncodedPictures(
        student=architecture.text_context(pipeline, captions),
        teacher=architecture.reference_context(pipeline, prompts, pictures),
        x0=architecture.picture_latents(pipeline, pictures),
    )


def batch_indices(count: int, batch_size: int, seed: int) -> Iterator[torch.Tensor]:
    """Endless batches of picture indices, in ascending order. Each epoch contains every picture once."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        for indices in torch.randperm(count, generator=generator).split(batch_size):
            yield indices.sort().values


def shifted(u: torch.Tensor, shift: float) -> torch.Tensor:
    """shift u / (1 + (shift - 1) u), the sigmas of a scheduler at u from 0 to 1 (arXiv 2403.03206, Eq. 23)."""
    return shift * u / (1 + (shift - 1) * u)


def loaded_shift(pipeline: DiffusionPipeline) -> float:
    """The shift of the sigmas from which diffusers' training scripts draw: those of the scheduler as it is loaded.

    A shift that depends on the size of the picture is not applied by then.
    """
    config = pipeline.scheduler.config
    return 1.0 if config.use_dynamic_shifting else config.shift


def deployed_shift(schedule: Schedule) -> float:
    """The shift of a schedule of K steps, whose sigmas are `shifted` from 1, 1 - 1 / K, ..., 1 / K."""
    u, sigma = 1 - 1 / len(schedule), float(schedule.sigmas[1])
    return sigma * (1 - u) / (u * (1 - sigma))


def flow_matching_loss(
    student: VelocityFunction,
    x0: torch.Tensor,
    generator: torch.Generator,
    *,
    shift: float = 1.0,
    sigmas: torch.Tensor | None = None,
) -> torch.Tensor:
    """MSE(v(x_sigma), noise - x0) at x_sigma = (1 - sigma) x0 + sigma noise (arXiv 2210.02747, Eq. 14).

    With `loaded_shift`, the same as diffusers' DreamBooth LoRA scripts with `--weighting_scheme none`.

    Args:
        x0: (B, C, h, w).
        shift: of each sample's sigma, see `shifted`; 1: uniform from 0 to 1.
        sigmas: each sample's sigma is drawn from these instead.
    """
    noise = torch.randn(x0.shape, generator=generator, device=x0.device)
    if sigmas is None:
        sigma = shifted(torch.rand(len(x0), generator=generator, device=x0.device), shift)
    else:
        sigma = sigmas[torch.randint(len(sigmas), (len(x0),), generator=generator, device=x0.device)]
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


class StateSampler:
    """Draws the state to train on.

    If states are drawn in proportion to the norms of their gradients, and weighted so that the mean is right, the
    variance is the least. The norms are a running mean; every state keeps a quarter of its uniform share.

    Args:
        num_states: K.
        by_norm: False for a uniform choice.
    """

    def __init__(self, num_states: int, *, by_norm: bool):
        self.norms, self.seen, self.by_norm = torch.zeros(num_states), torch.zeros(num_states), by_norm

    @property
    def probabilities(self) -> torch.Tensor:
        """(K,), uniform until every state has been seen."""
        uniform = torch.full_like(self.norms, 1 / len(self.norms))
        if not self.by_norm or not self.seen.all():
            return uniform
        return 0.25 * uniform + 0.75 * self.norms / self.norms.sum()

    def draw(self, generator: torch.Generator) -> tuple[int, float]:
        """(state, weight): the weighted loss is the mean loss of all states on average."""
        probabilities = self.probabilities
        index = int(torch.multinomial(probabilities, 1, generator=generator))
        return index, 1 / (len(probabilities) * float(probabilities[index]))

    def observe(self, index: int, norm: float) -> None:
        """Takes the norm of a gradient of the state's own loss, without a weight."""
        decay = min(0.9, float(self.seen[index] / (self.seen[index] + 1)))
        self.norms[index] = decay * self.norms[index] + (1 - decay) * norm
        self.seen[index] += 1


def one_state_loss(
    student: VelocityFunction, teacher: VelocityFunction, noise: torch.Tensor, schedule: Schedule, index: int
) -> torch.Tensor:
    """D-OPSD's x0 loss at one state of the student's trajectory."""
    (state,) = rollout(student, teacher, noise, schedule, trained=[index])
    return state.loss


def step_losses(
    method: str,
    student: VelocityFunction,
    teacher: VelocityFunction,
    x0: torch.Tensor,
    schedule: Schedule,
    generator: torch.Generator,
    *,
    num_draws: int | None = None,
    shift: float = 1.0,
) -> Iterator[torch.Tensor]:
    """The losses of one training step, whose mean is trained on.

    Args:
        method: "sft", "sft_deployed", "sft_prior", "sft_teacher" or "off_policy".
        x0: (B, C, h, w), latents of the batch's pictures.
        num_draws: of noise and sigma in flow matching. Default: K, as many states as D-OPSD sees.
        shift: see `flow_matching_loss`.
    """
    sigmas = None
    if method == "sft_deployed":
        sigmas = schedule.sigmas[:-1]
    elif method not in ("sft", "sft_prior"):
        noise = drawn_noise(x0, generator)
        if method == "off_policy":
            yield from off_policy_losses(student, teacher, noise, schedule)
            return
        assert method == "sft_teacher", method
        x0 = few_step_sample(teacher, noise, schedule)
    for _ in range(num_draws or len(schedule)):
        yield flow_matching_loss(student, x0, generator, shift=shift, sigmas=sigmas)


def drawn_noise(x0: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Noise like `x0`, from seeds that the generator draws."""
    return seeded_noise(x0.shape[1:], torch.randint(2**62, (len(x0),), generator=generator).tolist())


def build_optimizer(
    parameters: list[torch.nn.Parameter], settings: SharedSettings, num_steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """Optimizer and learning-rate scheduler of the training script."""
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, eps=settings.adam_epsilon, weight_decay=0.0)
    scheduler = get_scheduler(
        settings.lr_scheduler,
        optimizer,
        num_warmup_steps=settings.lr_warmup_steps,
        num_training_steps=num_steps,
    )
    return optimizer, scheduler


class BaselineTraining:
    """Trains the student, with gradients clipped as in the training script.

    Args:
        method: see the module's docstring.
        schedule: the K steps of the deployed sampler.
        prior: for "sft_prior".
        num_draws: see `step_losses`.
        shift: see `flow_matching_loss`. Default: `loaded_shift`.
    """

    def __init__(
        self,
        method: str,
        pipeline: DiffusionPipeline,
        roles: Roles,
        pictures: EncodedPictures,
        schedule: Schedule,
        settings: SharedSettings,
        *,
        seed: int,
        prior: PriorPictures | None = None,
        num_draws: int | None = None,
        shift: float | None = None,
    ):
        self.method, self.pipeline, self.roles, self.settings = method, pipeline, roles, settings
        self.pictures, self.schedule, self.prior, self.seed = pictures, schedule, prior, seed
        self.num_draws = num_draws or len(schedule)
        self.shift = loaded_shift(pipeline) if shift is None else shift
        self.generator = torch.Generator().manual_seed(seed)
        self.sampler = StateSampler(len(schedule), by_norm=method == "one_state_by_norm")

    def train(self, num_steps: int, should_stop: Callable[[int], bool] | None = None) -> int:
        """Trains for `num_steps` steps, or until `should_stop` says so, which gets the number of steps so far.

        Returns:
            The number of training steps.
        """
        optimizer, scheduler = build_optimizer(self.roles.student_parameters, self.settings, num_steps)
        batches = batch_indices(len(self.pictures.x0), self.settings.train_batch_size, self.seed)
        for step, indices in enumerate(islice(batches, num_steps), start=1):
            self.backpropagate(self.pictures.select(indices))
            torch.nn.utils.clip_grad_norm_(self.roles.student_parameters, 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            self.roles.after_optimizer_step(self.settings.ema_decay)
            if should_stop is not None and should_stop(step):
                return step
        return num_steps

    def backpropagate(self, batch: EncodedPictures) -> None:
        student = self.velocity(batch.student)
        teacher = self.roles.as_teacher(self.velocity(batch.teacher))
        if self.method.startswith("one_state"):
            index, weight = self.sampler.draw(self.generator)
            noise = drawn_noise(batch.x0, self.generator)
            (one_state_loss(student, teacher, noise, self.schedule, index) * weight).backward()
            norm = torch.stack([parameter.grad.norm() for parameter in self.roles.student_parameters]).norm()
            self.sampler.observe(index, float(norm) / weight)
            return
        count = len(self.schedule) if self.method == "off_policy" else self.num_draws
        options = {"num_draws": self.num_draws, "shift": self.shift}
        for loss in step_losses(self.method, student, teacher, batch.x0, self.schedule, self.generator, **options):
            (loss / count).backward()
            if self.method == "sft_prior":
                prior = self.prior.draw(len(batch.x0), self.generator)
                student_of_prior = self.velocity(prior.context)
                prior_loss = flow_matching_loss(student_of_prior, prior.x0, self.generator, shift=self.shift)
                (prior_loss / count).backward()

    def velocity(self, context: Context) -> VelocityFunction:
        return partial(self.pipeline.predict_velocity, context=context)
