"""One optimizer step of D-OPSD: micro-batches, rollout, backward pass per visited state, optimizer, EMA."""

import itertools
import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from functools import cache, partial

import torch
from accelerate import Accelerator
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from .compilation import CompiledBlocks
from .contexts import Contexts
from .data.order import micro_batches, place_seed, trained_states
from .errors import TrainingDiverged
from .memory import peak_memory_gb
from .model import Context, FewStepPipeline
from .optimizers import effective_learning_rate
from .prefetch import InputReader, MicroBatch, RolloutInputs
from .prior import PriorPrompts
from .roles import Roles
from .rollout import RolloutStep, VelocityFunction, rollout
from .settings import PerformanceSettings, Settings
from .sharding import average_gradients, calls_must_match, missing_calls


MAX_SKIPPED_STEPS = 20


class StudentVelocity(torch.nn.Module):
    """The student as a module: accelerate wraps it, so that processes share its gradients."""

    def __init__(self, pipeline: FewStepPipeline):
        super().__init__()
        self.pipeline = pipeline
        self.transformer = pipeline.transformer
        # Each process has read the same frozen weights. DDP would send them around, which fails if they are quantized.
        frozen = [name for name, parameter in self.named_parameters() if not parameter.requires_grad]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self, frozen)

    def forward(self, latents: torch.Tensor, timestep: torch.Tensor, context: Context) -> torch.Tensor:
        return self.pipeline.predict_velocity(latents, timestep, context)


def prepare_student(
    pipeline: FewStepPipeline,
    optimizer: torch.optim.Optimizer,
    settings: PerformanceSettings,
    accelerator: Accelerator,
) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """The student and its optimizer, prepared by the accelerator."""
    student = StudentVelocity(pipeline)
    if settings.is_sharded:  # DDP cannot hold weights that are not there as a whole.
        student = accelerator.prepare_model(student, device_placement=False, evaluation_mode=True)
        return student, accelerator.prepare_optimizer(optimizer)
    return accelerator.prepare(student, optimizer)


class TrainingStep:
    """The training step of arXiv 2605.05204, called once per optimizer step.

    Args:
        settings: resolved.
        accelerator: prepared `student` and `optimizer`.
        pipeline, roles: with the transformer that plays student and teacher.
        contexts: of the training data.
        student: `StudentVelocity`, prepared by the accelerator.
        optimizer, lr_scheduler: of the student's parameters.
        prior: prompts of prior preservation.
        compiled: the transformer's blocks, with `--compile`.
    """

    def __init__(
        self,
        settings: Settings,
        accelerator: Accelerator,
        *,
        pipeline: FewStepPipeline,
        roles: Roles,
        contexts: Contexts,
        student: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        lr_scheduler: torch.optim.lr_scheduler.LRScheduler,
        prior: PriorPrompts = PriorPrompts(),  # noqa: B008 - frozen
        compiled: CompiledBlocks | None = None,
    ):
        self.accelerator, self.pipeline, self.roles = accelerator, pipeline, roles
        self.order = contexts.data.order
        self.student, self.optimizer, self.lr_scheduler = student, optimizer, lr_scheduler
        self.compiled = compiled
        self.seed, self.max_train_steps = settings.training.seed, settings.training.max_train_steps
        self.accumulation_steps = settings.training.gradient_accumulation_steps
        self.rounds_at_random = settings.full.rounds_at_random
        self.has_dropout = settings.lora.lora_dropout > 0
        self.max_grad_norm = settings.optimizer.max_grad_norm
        self.num_rollout_steps = settings.distillation.num_rollout_steps
        self.num_trained_states = settings.distillation.num_trained_states
        self.loss_space = settings.distillation.loss_space
        self.ema_decay = settings.distillation.ema_decay
        self.prior, self.prior_settings = prior, settings.prior
        # Processes that share the transformer's weights exchange gradients here rather than in DDP.
        self.calls_match = calls_must_match(settings.performance, accelerator)
        # A role whose weights come from elsewhere is asked about all trained states at once.
        several = self.num_trained_states > 1
        self.batches_teacher = several and roles.teacher_is_off_device
        self.batches_base = several and roles.base_is_off_device
        self.inputs = InputReader(
            pipeline,
            contexts,
            prior,
            seed=self.seed,
            device=accelerator.device,
            num_copies=self.num_trained_states if self.batches_teacher else 1,
            num_prior_copies=self.num_trained_states if self.batches_base else 1,
        )
        # (height, width) -> schedule. Each is made once, since making it waits for the accelerator.
        self.schedule = cache(partial(pipeline.schedule, num_steps=self.num_rollout_steps, device=accelerator.device))
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
        has_prior = self.has_prior(step)
        measured = torch.zeros(2 if has_prior else 1, self.num_rollout_steps, 4, device=accelerator.device)
        own = self.own_micro_batches(step)
        next_steps = self.own_micro_batches(step + 1) if step + 1 < self.max_train_steps else []
        for batch, following in itertools.zip_longest(own, [*own[1:], *next_steps[:1]]):
            with accelerator.accumulate(self.student):
                if self.has_dropout:
                    torch.manual_seed(place_seed(self.seed, "dropout", str(batch.place)))
                inputs = self.inputs.get(batch, following)
                measured[0] += self.backpropagate(batch, inputs[0], exchanges=not has_prior)
                if has_prior:
                    measured[1] += self.backpropagate_prior(batch, inputs[1])
                if accelerator.sync_gradients:
                    # Averaged over processes, so that all of them see the same figures and stop at the same step.
                    measured = accelerator.reduce(measured / self.accumulation_steps, reduction="mean")
                    loss, figures = mean_figures(measured[0], self.num_trained_states)
                    prior_figures = self.prior_figures(measured[1]) if has_prior else {}
                    if self.calls_match and not self.roles.averages_gradients:
                        average_gradients(self.roles.student_parameters, accelerator.num_processes)
                    grad_norm = self.clip_gradients()
                    self.check_finite(step, loss, grad_norm, prior_figures.get("prior_loss", 0.0))
                if self.rounds_at_random:
                    torch.manual_seed(place_seed(self.seed, "rounding", f"{step}/{accelerator.process_index}"))
                self.optimizer.step()
                self.optimizer.zero_grad()
        rate = effective_learning_rate(self.optimizer)
        self.after_optimizer_step()
        if self.compiled is not None:
            self.compiled.report()
        metrics = {"loss": loss, "lr": rate, "grad_norm": grad_norm, **figures, **prior_figures}
        return metrics | {"seconds_per_step": time.perf_counter() - started, "peak_memory_gb": peak_memory_gb()}

    def clip_gradients(self) -> float:
        """Clips the student's gradients to `--max_grad_norm`, and returns the norm that they had."""
        norm = self.accelerator.clip_grad_norm_(self.roles.student_parameters, self.max_grad_norm)
        return (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()

    def has_prior(self, step: int) -> bool:
        return bool(self.prior.trained) and step % self.prior_settings.prior_every == 0

    def own_micro_batches(self, step: int) -> list[MicroBatch]:
        own = micro_batches(
            self.order,
            step,
            accumulation_steps=self.accumulation_steps,
            num_processes=self.accelerator.num_processes,
            process_index=self.accelerator.process_index,
        )
        return [MicroBatch(*one, self.has_prior(step)) for one in own]

    def backpropagate(self, batch: MicroBatch, inputs: RolloutInputs, *, exchanges: bool = True) -> torch.Tensor:
        """Backpropagates the distillation loss of one micro-batch; see `backpropagate_states`.

        Args:
            exchanges: whether processes exchange gradients in its last backward pass.
        """
        inputs = inputs.to(self.accelerator.device)
        trained = self.trained_states("states", batch.place)
        teacher = self.roles.as_teacher(partial(self.pipeline.predict_velocity, context=inputs.teacher))
        batches_teacher = self.batches_teacher
        if not batches_teacher:
            teacher = self.called_as_often(teacher, inputs.student, "states", batch.place)
        states = self.visited_states(inputs, teacher, trained, exchanges=exchanges, batches_teacher=batches_teacher)
        return self.backpropagate_states(states, batch.weight)

    def backpropagate_prior(self, batch: MicroBatch, inputs: RolloutInputs) -> torch.Tensor:
        """Backpropagates the loss of prior preservation, on as many prompts as the micro-batch has samples."""
        inputs = inputs.to(self.accelerator.device)
        trained = self.trained_states("prior states", batch.place)
        base = self.roles.as_base(partial(self.pipeline.predict_velocity, context=inputs.teacher))
        batches_teacher = self.batches_base
        if not batches_teacher:
            base = self.called_as_often(base, inputs.student, "prior states", batch.place)
        states = self.visited_states(inputs, base, trained, exchanges=True, batches_teacher=batches_teacher)
        return self.backpropagate_states(states, batch.weight, self.prior_settings.prior_loss_weight)

    def trained_states(self, purpose: str, place: int) -> list[int]:
        counts = {"num_states": self.num_rollout_steps, "num_trained": self.num_trained_states}
        return trained_states(self.seed, purpose, place, **counts)

    def called_as_often(
        self, teacher: VelocityFunction, context: Context, purpose: str, place: int
    ) -> VelocityFunction:
        """The teacher; if processes share weights, calls that this process lacks beside others come before it.

        The others make them as students, so this process does too: each must hold out the same role's weights. They
        cost no time, since processes wait for the one that computes most in any case.

        Args:
            context: for such calls.
        """
        if not self.calls_match:
            return teacher
        first = place - self.accelerator.process_index
        by_process = [self.trained_states(purpose, first + index) for index in range(self.accelerator.num_processes)]
        missing = iter(missing_calls(by_process[self.accelerator.process_index], by_process))

        def padded(latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            with self.roles.idle_role():
                for _ in range(next(missing)):
                    self.pipeline.predict_velocity(latents, timestep, context)
            return teacher(latents, timestep)

        return padded

    def backpropagate_states(
        self, states: Iterator[RolloutStep], weight: float, loss_weight: float = 1.0
    ) -> torch.Tensor:
        """Backpropagates each trained state before the next one is computed.

        The expectation over the drawn states is the gradient of the mean loss over all K states.

        Returns:
            (K, 4), float32, zero for states that are not trained: loss, cosine and norm ratio of student and teacher,
            and 1, all times the weight.
        """
        measured = torch.zeros(self.num_rollout_steps, 4, device=self.accelerator.device)
        one = torch.ones(1, device=measured.device)
        for state in states:
            self.accelerator.backward(state.loss * loss_weight * weight / self.num_trained_states)
            measured[state.index] = torch.cat([state.loss.detach()[None], state.agreement, one])
        return measured * weight

    def visited_states(
        self,
        inputs: RolloutInputs,
        teacher: VelocityFunction,
        trained: list[int],
        *,
        exchanges: bool,
        batches_teacher: bool = False,
    ) -> Iterator[RolloutStep]:
        """Rolls out the student, all samples in one batch; yields the trained states.

        Args:
            inputs: on the accelerator.
            exchanges: whether processes exchange gradients in the last of these backward passes.
            batches_teacher: see `rollout`.
        """
        student = self.student_velocity(inputs.student, trained[-1] + 1 if exchanges else None)
        schedule = self.schedule(*inputs.size)
        return rollout(
            student,
            teacher,
            inputs.noise,
            schedule,
            trained=trained,
            loss_space=self.loss_space,
            batches_teacher=batches_teacher,
            visits_all=self.calls_match,  # processes then call the transformer equally often
        )

    def student_velocity(self, context: Context, last_call: int | None) -> VelocityFunction:
        """The student as the rollout calls it. Processes exchange gradients in the backward pass of one call only."""
        visited = itertools.count(1)

        def velocity(latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            exchanges = next(visited) == last_call and self.accelerator.sync_gradients
            with nullcontext() if exchanges else self.accelerator.no_sync(self.student):
                prediction = self.student(latents, timestep, context)
            return prediction.to(latents.dtype)  # accelerate returns float32

        return velocity

    def prior_figures(self, measured: torch.Tensor) -> dict[str, float]:
        loss, figures = mean_figures(measured, self.num_trained_states)
        losses = {f"prior_{name}": value for name, value in figures.items() if name.startswith("loss/")}
        return {"prior_loss": loss, **losses}

    def check_finite(self, step: int, loss: float, grad_norm: float, prior_loss: float = 0.0) -> None:
        if math.isfinite(loss) and not math.isfinite(prior_loss):
            raise TrainingDiverged(
                f"at step {step + 1} the loss of prior preservation (--with_prior_preservation) is {prior_loss:g}"
            )
        # The fp16 gradient scaler skips a step whose gradients overflow; that is not an error.
        if math.isfinite(loss) and (math.isfinite(grad_norm) or self.accelerator.scaler is not None):
            return
        raise TrainingDiverged(f"at step {step + 1} the loss is {loss:g} and the gradient norm {grad_norm:g}")

    def after_optimizer_step(self) -> None:
        was_skipped = self.optimizer.step_was_skipped
        self.num_skipped = count_skipped(self.num_skipped, was_skipped)
        if not was_skipped:
            self.lr_scheduler.step()
            self.roles.after_optimizer_step(self.ema_decay)


def mean_figures(measured: torch.Tensor, num_trained: int) -> tuple[float, dict[str, float]]:
    """The mean loss of a step, and its figures per visited state. A state that no micro-batch was trained on has none.

    Args:
        measured: (K, 4), the mean over micro-batches and processes of what `TrainingStep.backpropagate` returns.
        num_trained: states that each micro-batch is trained on.
    """
    losses, cosines, norm_ratios, seen = measured.T.tolist()
    figures = {}
    for name, values in (("loss", losses), ("cosine", cosines), ("norm_ratio", norm_ratios)):
        for index, value in enumerate(values):
            if seen[index] > 0:
                # If every micro-batch is trained on every state, `seen` is 1 up to rounding.
                share = 1.0 if num_trained == len(losses) else seen[index]
                figures[f"{name}/state_{index + 1}"] = value / share
    return sum(losses) / num_trained, figures


def count_skipped(num_skipped: int, was_skipped: bool) -> int:
    """Steps in a row that the fp16 gradient scaler has skipped. It skips a few while it looks for its scale.

    Raises:
        TrainingDiverged: so many were skipped that it will not find one.
    """
    num_skipped = num_skipped + 1 if was_skipped else 0
    if num_skipped == MAX_SKIPPED_STEPS:
        raise TrainingDiverged(f"--mixed_precision fp16: gradients overflowed in {num_skipped} steps in a row")
    return num_skipped
