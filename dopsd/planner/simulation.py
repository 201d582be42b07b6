"""The run's own code on fake tensors, which have shapes and no numbers: what it allocates and computes.

So the figures follow the code: rollout, loss, backward pass, roles, pipelines and models are the real ones.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from ..lora_roles import StudentTeacherLoRA
from ..model import Context, FewStepPipeline
from ..prefetch import MicroBatch, RolloutInputs
from ..roles import Roles
from ..rollout import RolloutStep, VelocityFunction
from ..settings import Settings
from ..step import StudentVelocity, TrainingStep
from ..weight_roles import StudentTeacherWeights, freeze_others
from .allocations import CUDA_GRANULARITY, AllocationTracker, pinned_bytes, storage_bytes
from .operators import FlopCounter, gpu_operators
from .trained import PerState


CPU = torch.device("cpu")
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Batch:
    """The largest micro-batch of a run.

    Attributes:
        size: (height, width) in pixels.
        count: samples.
        student, teacher: shapes of a sample's encodings.
        prior: those of a prompt of prior preservation; None without it.
    """

    size: tuple[int, int]
    count: int
    student: tuple[Shape, ...]
    teacher: tuple[Shape, ...]
    prior: tuple[Shape, ...] | None = None


@dataclass(frozen=True)
class Cost:
    """Of some operations.

    Attributes:
        peak: bytes that they allocate at most at the same time.
        flops: floating point operations.
    """

    peak: int = 0
    flops: int = 0


@dataclass(frozen=True)
class StepCost:
    """Of the micro-batches of an optimizer step.

    Attributes:
        trained: bytes of what the optimizer changes: an adapter, or weights.
        peak: bytes of activations, gradients and temporaries while the transformer is the student.
        teacher_work, prior_work: the same of a forward pass of the teacher and, for prior preservation, of the base
            model, without the gradients that are there.
        in_host: bytes of activations that are kept in host memory.
        flops: floating point operations.
    """

    trained: int
    peak: int
    teacher_work: int
    prior_work: int
    in_host: int
    flops: PerState


class OneProcess:
    """Stands in for the accelerator in one process, and takes no device."""

    device = CPU
    num_processes, process_index, local_process_index = 1, 0, 0
    is_main_process = is_local_main_process = sync_gradients = True
    scaler = None

    def no_sync(self, module: nn.Module) -> nullcontext:
        return nullcontext()

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def wait_for_everyone(self) -> None:
        pass


class ShapedContexts:
    """Contexts whose tensors have the shapes of the run's encodings."""

    def __init__(self, stack: Callable[[list[tuple[torch.Tensor, ...]]], Context], batch: Batch, dtype: torch.dtype):
        self.stack, self.batch, self.dtype = stack, batch, dtype
        self.data, self.cache = SimpleNamespace(order=None), None

    def of(self, shapes: tuple[Shape, ...]) -> Context:
        """The context of a micro-batch whose samples have encodings of these shapes."""
        samples = range(self.batch.count)
        return self.stack([tuple(torch.empty(shape, dtype=self.dtype) for shape in shapes) for _ in samples])


class OneState(TrainingStep):
    """The training step, trained on the first state only.

    Attributes:
        leaves_gradients: whether gradients are there when the teacher has been called, as after an earlier pass.
        tracker: counts what the step allocates.
        peak: see `StepCost`.
        role_work: what the last forward pass of another role has allocated.
    """

    leaves_gradients = False
    tracker: AllocationTracker
    peak = role_work = 0

    def trained_states(self, purpose: str, place: int) -> list[int]:
        return [0]

    def leave_gradients(self) -> None:
        for parameter in self.roles.student_parameters:
            if not parameter._post_accumulate_grad_hooks:
                parameter.grad = torch.zeros_like(parameter)

    def visited_states(
        self, inputs: RolloutInputs, teacher: VelocityFunction, trained: list[int], **options: bool
    ) -> Iterator[RolloutStep]:
        def then_gradients(latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            self.end_of_student()
            before = self.tracker.live
            velocity = teacher(latents, timestep)
            self.role_work = self.tracker.peak - before
            self.tracker.reset_peak()
            if self.leaves_gradients:
                self.leave_gradients()
            return velocity

        return super().visited_states(inputs, then_gradients, trained, **options)

    def end_of_student(self) -> None:
        self.peak = max(self.peak, self.tracker.peak)
        self.tracker.reset_peak()


def drop_gradient(parameter: nn.Parameter) -> None:
    parameter.grad = None


def on_meta(build: Callable[[], nn.Module], dtype: torch.dtype) -> nn.Module:
    """A module without numbers, in `dtype`, as `from_pretrained` would load it."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            return build().eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)


def materialize(module: nn.Module) -> None:
    """Puts what is on the meta device onto the CPU: as fake tensors if a fake mode is entered."""
    made: dict[int, torch.Tensor] = {}
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and tensor.device.type == "meta":
                    if id(tensor) not in made:
                        new = torch.empty(tensor.shape, dtype=tensor.dtype)
                        is_parameter = isinstance(tensor, nn.Parameter)
                        made[id(tensor)] = nn.Parameter(new, tensor.requires_grad) if is_parameter else new
                    tensors[name] = made[id(tensor)]


@dataclass
class Simulator:
    """Runs parts of a run on fake tensors.

    Args:
        pipeline: without components that have weights.
        stack: `Conditioning.stack`.
        build_transformer, build_text_encoder, build_vae: called on the meta device.
        on_gpu: whether to take a GPU's operators or this CPU's.
    """

    pipeline: FewStepPipeline
    stack: Callable[[list[tuple[torch.Tensor, ...]]], Context]
    build_transformer: Callable[[], nn.Module]
    build_text_encoder: Callable[[], nn.Module]
    build_vae: Callable[[], nn.Module]
    on_gpu: bool
    fake_mode: FakeTensorMode = field(default_factory=lambda: FakeTensorMode(allow_non_fake_inputs=True))

    def training(
        self, batch: Batch, settings: Settings, trained: dict[str, Any] | list[str], dtype: torch.dtype
    ) -> StepCost:
        """The micro-batches of an optimizer step, each as large as the largest.

        Args:
            settings: resolved.
            trained: arguments of `StudentTeacherLoRA`, or the names of the weights.
            dtype: of the transformer.
        """
        num_backwards = settings.distillation.num_trained_states * settings.training.gradient_accumulation_steps
        with self.components(batch, settings.distillation.num_rollout_steps, dtype) as (contexts, transformer):
            make_roles = self.weight_roles if settings.full.is_full else self.adapter_roles
            roles = make_roles(transformer, trained, settings)
            with self.fake():
                in_host = KeptInHost()
                if settings.performance.gradient_checkpointing:
                    is_offloaded = self.on_gpu and settings.performance.offload_activations
                    transformer.enable_gradient_checkpointing(in_host.checkpoint if is_offloaded else None)
                # With prior preservation, the student's pass is often the same one again.
                repeats = batch.prior == batch.student
                step = OneState(
                    settings,
                    OneProcess(),
                    pipeline=self.pipeline,
                    roles=roles,
                    contexts=contexts,
                    student=StudentVelocity(self.pipeline),
                    optimizer=None,
                    lr_scheduler=None,
                )
                step.leaves_gradients = repeats and num_backwards == 1
                micro_batch, noise = MicroBatch(0, [], 1.0), self.noise(batch)
                with self.measured() as (step.tracker, counter):
                    student, teacher = contexts.of(batch.student), contexts.of(batch.teacher)
                    if num_backwards > 1:
                        step.leave_gradients()
                    step.backpropagate(micro_batch, RolloutInputs(batch.size, noise, student, teacher))
                    of_state, teacher_work = counter.total, step.role_work
                    if batch.prior is not None and not repeats:
                        prior = contexts.of(batch.prior)
                        step.backpropagate_prior(micro_batch, RolloutInputs(batch.size, noise, prior, prior))
                    of_prior = counter.total - of_state
                    step.end_of_student()
                passed = self.forward(step.student_velocity(student, None), batch).flops
                passed_prior = 0
                if repeats:
                    of_teacher = self.forward(roles.as_teacher(self.velocity(teacher)), batch)
                    of_base = self.forward(roles.as_base(self.velocity(student)), batch)
                    of_prior, passed_prior = of_state - of_teacher.flops + of_base.flops, passed
                    step.role_work = of_base.peak
                elif batch.prior is not None:
                    passed_prior = self.forward(step.student_velocity(prior, None), batch).flops
                return StepCost(
                    trained=storage_bytes(roles.student_parameters),
                    peak=step.peak,
                    teacher_work=teacher_work,
                    prior_work=step.role_work,
                    in_host=in_host.num_bytes,
                    flops=PerState(of_state, passed, of_prior, passed_prior),
                )

    def adapter_roles(self, transformer: nn.Module, options: dict[str, Any], settings: Settings) -> Roles:
        with torch.device("meta"):
            roles = StudentTeacherLoRA(transformer, **options, teacher=settings.distillation.teacher)
        with self.fake():
            materialize(transformer)
        return roles

    def weight_roles(self, transformer: nn.Module, names: list[str], settings: Settings) -> Roles:
        """Roles that compute with the student's weights: what others take depends on where they are.

        Gradients of shared weights do not stay: each process has a part of them.
        """
        freeze_others(transformer, names)
        is_shared = settings.performance.is_sharded
        has_masters = not (is_shared or settings.full.rounds_at_random)
        with self.fake():
            materialize(transformer)
            options = {"teacher": "student", "ema_device": CPU, "base_device": CPU}
            roles = StudentTeacherWeights(transformer, **options, has_master_weights=has_masters)
            if is_shared:
                for weight in roles.student_parameters:
                    weight.register_post_accumulate_grad_hook(drop_gradient)
        return roles

    def velocity(self, context: Context) -> VelocityFunction:
        return partial(self.pipeline.predict_velocity, context=context)

    def forward(self, velocity: VelocityFunction, batch: Batch) -> Cost:
        """One prediction without a gradient."""
        with torch.no_grad(), self.measured() as (tracker, counter):
            velocity(self.noise(batch), self.pipeline.schedule(*batch.size, 1).timesteps[0])
        return Cost(tracker.peak, counter.total)

    def drawing(self, batch: Batch, dtype: torch.dtype) -> tuple[Cost, Cost]:
        """Sampling one step without an adapter, and decoding one picture.

        Args:
            batch: of one picture, drawn with its `teacher` context.
        """
        pipeline = self.pipeline
        with self.components(batch, 1, dtype) as (contexts, transformer), self.fake(), torch.no_grad():
            materialize(transformer)
            materialize(pipeline.vae)
            context, noise = contexts.of(batch.teacher), self.noise(batch)
            with self.measured() as (tracker, counter):
                latents = pipeline.sample(context, noise, 1)
            sampling = Cost(tracker.peak, counter.total)
            to_pictures = patch.object(pipeline.image_processor, "postprocess", lambda *args, **kwargs: [])
            with to_pictures, self.measured() as (tracker, counter):
                pipeline.decode(latents)
            return sampling, Cost(tracker.peak, counter.total)

    def texts(self, count: int, length: int, with_head: bool, dtype: torch.dtype) -> Cost:
        """The text encoder's hidden states of `count` texts of `length` tokens.

        Args:
            with_head: whether a language model's head computes too, as in the stock pipelines.
        """
        text_encoder = on_meta(self.build_text_encoder, dtype)
        with self.fake(), torch.no_grad():
            materialize(text_encoder)
            module = text_encoder if with_head else text_encoder.base_model
            with self.measured() as (tracker, counter):
                tokens = torch.zeros(count, length, dtype=torch.long)
                inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
                module(**inputs, output_hidden_states=True, use_cache=False)
        return Cost(tracker.peak, counter.total)

    def picture(self, size: tuple[int, int], dtype: torch.dtype) -> Cost:
        """Encoding a picture of that (height, width) with the VAE."""
        vae = on_meta(self.build_vae, dtype)
        with self.fake(), torch.no_grad():
            materialize(vae)
            with self.measured() as (tracker, counter):
                vae.encode(torch.empty(1, 3, *size, dtype=dtype))
        return Cost(tracker.peak, counter.total)

    # What they have in common

    @contextmanager
    def fake(self) -> Iterator[None]:
        with self.fake_mode, gpu_operators() if self.on_gpu else nullcontext():
            yield

    @contextmanager
    def measured(self) -> Iterator[tuple[AllocationTracker, FlopCounter]]:
        with AllocationTracker(CUDA_GRANULARITY if self.on_gpu else 1) as tracker, FlopCounter() as counter:
            yield tracker, counter

    def noise(self, batch: Batch) -> torch.Tensor:
        pipeline = self.pipeline
        return torch.empty(batch.count, *pipeline.latent_shape(*batch.size), dtype=pipeline.latents_dtype)

    @contextmanager
    def components(
        self, batch: Batch, num_steps: int, dtype: torch.dtype
    ) -> Iterator[tuple[ShapedContexts, nn.Module]]:
        """The pipeline with a transformer and a VAE on the meta device, with its schedule and positions made.

        These are made of numbers, which fake tensors lack, and kept.
        """
        pipeline = self.pipeline
        pipeline.vae = on_meta(self.build_vae, dtype)
        contexts = ShapedContexts(self.stack, batch, dtype)
        schedule = pipeline.schedule(*batch.size, num_steps)
        pipeline.transformer = NoTransformer(dtype)
        for shapes in filter(None, (batch.student, batch.teacher, batch.prior)):
            with suppress(TransformerCalled):
                pipeline.predict_velocity(self.noise(batch), schedule.timesteps[0], contexts.of(shapes))
        transformer = pipeline.transformer = on_meta(self.build_transformer, dtype)
        try:
            with patch.object(pipeline, "schedule", lambda *args, **kwargs: schedule):
                yield contexts, transformer
        finally:
            pipeline.transformer = None


class TransformerCalled(Exception):
    """A pipeline has computed all that it computes before."""


class NoTransformer(nn.Module):
    """Raises when it is called."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype

    def forward(self, *args: Any, **kwargs: Any) -> None:
        raise TransformerCalled


class KeptInHost:
    """Checkpointing as with `--offload_activations`: what is kept for the backward pass leaves the accelerator.

    Attributes:
        num_bytes: of the pinned memory that it takes, all passes together.
    """

    def __init__(self):
        self.num_bytes = 0

    def checkpoint(self, function: Callable[..., Any], *inputs: Any) -> Any:
        with torch.autograd.graph.saved_tensors_hooks(self.pack, self.unpack):
            return checkpoint(function, *inputs, use_reentrant=False)

    def pack(self, tensor: torch.Tensor) -> tuple[torch.Size, torch.dtype]:
        self.num_bytes += pinned_bytes(tensor.nbytes)
        return tensor.shape, tensor.dtype

    def unpack(self, packed: tuple[torch.Size, torch.dtype]) -> torch.Tensor:
        shape, dtype = packed
        return torch.empty(shape, dtype=dtype)
