"""The training step as the scripts' `main` puts it together, and its passes alone."""

import itertools
from contextlib import AbstractContextManager
from functools import partial

import torch
from diffusers.models.attention_dispatch import attention_backend

from benchmarks.step_measure import Call
from benchmarks.step_models import PRIOR_PROMPT, RandomModel
from dopsd.execution import prepare_transformer
from dopsd.lora_roles import STUDENT, StudentTeacherLoRA, adapter_options
from dopsd.model import Context
from dopsd.optimizers import build_lr_scheduler, build_optimizer
from dopsd.prior import PriorPrompts
from dopsd.step import TrainingStep, prepare_student


class TrainingLoop:
    """`TrainingStep` with everything around it, on random weights.

    Args:
        model: the model, of which this loop has a copy with the same weights.
        flags: of the training script.

    Attributes:
        parameters: the trained ones, by name.
        place: of the next step.
        period: number of steps whose mean time is that of a long run: one per state if a step trains on one state.
            The states then take turns, instead of being drawn at random.
    """

    def __init__(self, model: RandomModel, flags: list[str]):
        self.settings = settings = model.settings(flags)
        transformer = model.transformer()
        self.pipeline = pipeline = model.pipeline(transformer)
        self.contexts = contexts = model.contexts(pipeline, settings)
        lora_options = adapter_options(settings.lora, transformer, model.model.portable_lora_layers)
        self.roles = roles = StudentTeacherLoRA(transformer, **lora_options, teacher=settings.distillation.teacher)
        # diffusers chooses the backend for the whole process; the transformer remembers its own.
        with attention_backend():
            compiled = prepare_transformer(transformer, roles.parameters, settings.performance, model.accelerator)
        self.parameters = roles.named_parameters(STUDENT)
        self.optimizer = build_optimizer(settings.optimizer, roles.student_parameters, 1)
        lr_scheduler = build_lr_scheduler(settings.optimizer, self.optimizer, settings.training.max_train_steps)
        student, optimizer = prepare_student(pipeline, self.optimizer, settings.performance, model.accelerator)
        self.has_prior = settings.prior.with_prior_preservation
        self.train_step = TrainingStep(
            settings,
            model.accelerator,
            pipeline=pipeline,
            roles=roles,
            contexts=contexts,
            student=student,
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            prior=PriorPrompts(unrelated=(PRIOR_PROMPT,)) if self.has_prior else PriorPrompts(),
            compiled=compiled,
        )
        self.load_state_dict = roles.load_state_dict
        self.place, self.num_states = 0, settings.distillation.num_rollout_steps
        self.period = 1 if settings.distillation.num_trained_states == self.num_states else self.num_states
        if self.period > 1:
            assert settings.distillation.num_trained_states == 1
            self.train_step.trained_states = self.state_in_turn

    def __call__(self) -> None:
        self.train_step(self.place)
        self.place += 1

    @property
    def compiler_failed(self) -> bool:
        return self.train_step.compiled is not None and self.train_step.compiled.is_stopped

    def state_in_turn(self, purpose: str, place: int) -> list[int]:
        """The state of this place. That of prior preservation is another one, as it may be if both are drawn."""
        return [(place + (purpose == "prior states")) % self.num_states]

    def gradient_calls(self) -> list[Call]:
        """Steps from one noise whose mean gradient is that of a step on all states; none with prior preservation."""
        if self.has_prior:
            return []
        if self.period == 1:
            return [partial(self.train_step, 0)]
        return [partial(self.step_on, state) for state in range(self.num_states)]

    def step_on(self, state: int) -> None:
        """A step from the first place's noise that trains on this state."""
        self.train_step.trained_states = lambda purpose, place: [state]
        self.train_step(0)
        self.train_step.trained_states = self.state_in_turn


class Passes:
    """The forward and backward passes of a training step and nothing else: what it cannot be faster than.

    Roles are switched once per step instead of once per state. There is no loss, noise, optimizer, EMA or log.
    """

    def __init__(self, loop: TrainingLoop):
        self.loop, self.period, self.places = loop, loop.period, itertools.count()
        pipeline, contexts, device = loop.pipeline, loop.contexts, loop.contexts.device
        samples = contexts.data.order.batch(0)
        size = contexts.data.bucket(samples[0])
        self.latents = torch.randn(1, *pipeline.latent_shape(*size)).to(device, pipeline.latents_dtype)
        self.timestep = pipeline.schedule(*size, loop.num_states, device).timesteps[-1]
        self.student, self.teacher = contexts.load(samples)
        self.prior = contexts.student([PRIOR_PROMPT])

    def __call__(self) -> None:
        loop, place = self.loop, next(self.places)
        trained_states, roles = loop.train_step.trained_states, loop.roles
        self.rollout(trained_states("states", place), self.student, roles.teacher_role(), self.teacher)
        if loop.has_prior:
            self.rollout(trained_states("prior states", place), self.prior, roles.base_role(), self.prior)
        for parameter in loop.parameters.values():
            parameter.grad = None

    def rollout(
        self, trained: list[int], student: Context, role: AbstractContextManager[None], target: Context
    ) -> None:
        """Args as for `TrainingStep.visited_states`; `role` and `target` are those of the teacher or the base."""
        with torch.no_grad():
            for _ in range(trained[-1] + 1 - len(trained)):
                self.velocity(student)
        with role:
            for _ in trained:
                self.velocity(target)
        for _ in trained:
            velocity = self.velocity(student)
            velocity.backward(torch.ones_like(velocity))

    def velocity(self, context: Context) -> torch.Tensor:
        return self.loop.pipeline.predict_velocity(self.latents, self.timestep, context)
