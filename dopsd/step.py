"""One optimizer step of D-OPSD: micro-batches, rollout, backward pass per visited state, optimizer, EMA."""

import itertools
import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial

import torch
from accelerate import Accelerator

from .contexts import Contexts
from .data.order import Sample, micro_batches, noise_seed, place_seed
from .errors import TrainingDiverged
from .memory import peak_memory_gb
from .model import Context, FewStepPipeline
from .optimizers import effective_learning_rate
from .roles import StudentTeacherLoRA
from .rollout import RolloutStep, VelocityFunction, rollout, seeded_noise
from .settings import Settings


MAX_SKIPPED_STEPS = 20


class StudentVelocity(torch.nn.Module):
    """The student as a module: accelerate wraps it, so that processes share its gradients."""

    def __init__(self, pipeline: FewStepPipeline):
        super().__init__()
        self.pipeline = pipeline
        self.transformer = pipeline.transformer

    def forward(self, latents: torch.Tensor, timestep: torch.Tensor, context: Context) -> torch.Tensor:
        return self.pipeline.predict_velocity(latents, timestep, context)


class TrainingStep:
    """The training step of arXiv 2605.05204, called once per optimizer step.

    Args:
        settings: resolved.
        accelerator: prepared `student` and `optimizer`.
        pipeline, roles: with the transformer that plays student and teacher.
        contexts: of the training data.
        student: `StudentVelocity`, prepared by the accelerator.
        optimizer, lr_scheduler: of the student's parameters.
    """

    def __init__(
        self,
        settings: Settings,
        accelerator: Accelerator,
        *,
        pipeline: FewStepPipeline,
        roles: StudentTeacherLoRA,
        contexts: Contexts,
        student: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        lr_scheduler: torch.optim.lr_scheduler.LRScheduler,
    ):
        self.accelerator, self.pipeline, self.roles = accelerator, pipeline, roles
        self.contexts, self.data = contexts, contexts.data
        self.student, self.optimizer, self.lr_scheduler = student, optimizer, lr_scheduler
        self.seed = settings.training.seed
        self.accumulation_steps = settings.training.gradient_accumulation_steps
        self.has_dropout = settings.lora.lora_dropout > 0
        self.max_grad_norm = settings.optimizer.max_grad_norm
        self.num_rollout_steps = settings.distillation.num_rollout_steps
        self.loss_space = settings.distillation.loss_space
        self.ema_decay = settings.distillation.ema_decay
        self.num_skipped = 0  # steps in a row that the fp16 gradient scaler skipped

    def __call__(self, step: int) -> dict[str, float]:
        """Trains step `step`, counted from 0, on this process's micro-batches.

        Returns:
            Loss, gradient norm and figures per visited state, over all processes; learning rate, time and memory.

        Raises:
            TrainingDiverged: the loss or the gradient norm is not finite. The optimizer has not stepped.
        """
        started = time.perf_counter()
        accelerator = self.accelerator
        measured = torch.zeros(self.num_rollout_steps, 3, device=accelerator.device)
        for place, samples, weight in self.own_micro_batches(step):
            with accelerator.accumulate(self.student):
                if self.has_dropout:
                    torch.manual_seed(place_seed(self.seed, "dropout", str(place)))
                measured += self.backpropagate(samples, weight) / self.accumulation_steps
                if accelerator.sync_gradients:
                    # Averaged over processes, so that all of them see the same figures and stop at the same step.
                    losses, cosines, norm_ratios = accelerator.reduce(measured, reduction="mean").T.tolist()
                    loss = sum(losses) / len(losses)
                    grad_norm = accelerator.clip_grad_norm_(self.roles.student_parameters, self.max_grad_norm).item()
                    self.check_finite(step, loss, grad_norm)
                self.optimizer.step()
                self.optimizer.zero_grad()
        metrics = {"loss": loss, "lr": effective_learning_rate(self.optimizer), "grad_norm": grad_norm}
        self.after_optimizer_step()
        for name, values in (("loss", losses), ("cosine", cosines), ("norm_ratio", norm_ratios)):
            metrics |= {f"{name}/state_{number}": value for number, value in enumerate(values, start=1)}
        return metrics | {"seconds_per_step": time.perf_counter() - started, "peak_memory_gb": peak_memory_gb()}

    def own_micro_batches(self, step: int) -> Iterator[tuple[int, list[Sample], float]]:
        return micro_batches(
            self.data.order,
            step,
            accumulation_steps=self.accumulation_steps,
            num_processes=self.accelerator.num_processes,
            process_index=self.accelerator.process_index,
        )

    def backpropagate(self, samples: list[Sample], weight: float) -> torch.Tensor:
        """Rolls out one micro-batch and backpropagates each visited state before the next one is computed.

        Returns:
            (K, 3), float32: loss, cosine and norm ratio of student and teacher per visited state, times the weight.
        """
        measured = []
        for state in self.visited_states(samples):
            self.accelerator.backward(state.loss * weight / self.num_rollout_steps)
            measured.append(torch.cat([state.loss.detach()[None], state.agreement]))
        return torch.stack(measured) * weight

    def visited_states(self, samples: list[Sample]) -> Iterator[RolloutStep]:
        """Rolls out the student from each sample's own noise, all samples in one batch."""
        pipeline, device = self.pipeline, self.accelerator.device
        height, width = self.data.bucket(samples[0])
        student_context, teacher_context = self.contexts.load(samples)
        seeds = [noise_seed(self.seed, sample) for sample in samples]
        noise = seeded_noise(pipeline.latent_shape(height, width), seeds).to(device, pipeline.latents_dtype)
        schedule = pipeline.schedule(height, width, self.num_rollout_steps, device)
        student = self.student_velocity(student_context)
        teacher = self.roles.as_teacher(partial(pipeline.predict_velocity, context=teacher_context))
        return rollout(student, teacher, noise, schedule, loss_space=self.loss_space)

    def student_velocity(self, context: Context) -> VelocityFunction:
        """The student as the rollout calls it. Processes exchange gradients in the last state's backward pass only."""
        visited = itertools.count(1)

        def velocity(latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            is_last = next(visited) == self.num_rollout_steps and self.accelerator.sync_gradients
            with nullcontext() if is_last else self.accelerator.no_sync(self.student):
                prediction = self.student(latents, timestep, context)
            return prediction.to(latents.dtype)  # accelerate returns float32

        return velocity

    def check_finite(self, step: int, loss: float, grad_norm: float) -> None:
        # The fp16 gradient scaler skips a step whose gradients overflow; that is not an error.
        if math.isfinite(loss) and (math.isfinite(grad_norm) or self.accelerator.scaler is not None):
            return
        raise TrainingDiverged(f"at step {step + 1} the loss is {loss:g} and the gradient norm {grad_norm:g}")

    def after_optimizer_step(self) -> None:
        was_skipped = self.optimizer.step_was_skipped
        self.num_skipped = count_skipped(self.num_skipped, was_skipped)
        if not was_skipped:
            self.lr_scheduler.step()
            self.roles.update_teacher(self.ema_decay)


def count_skipped(num_skipped: int, was_skipped: bool) -> int:
    """Steps in a row that the fp16 gradient scaler has skipped. It skips a few while it looks for its scale.

    Raises:
        TrainingDiverged: so many were skipped that it will not find one.
    """
    num_skipped = num_skipped + 1 if was_skipped else 0
    if num_skipped == MAX_SKIPPED_STEPS:
        raise TrainingDiverged(f"--mixed_precision fp16: gradients overflowed in {num_skipped} steps in a row")
    return num_skipped
