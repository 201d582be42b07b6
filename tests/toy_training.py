"""A toy model's LoRA, optimizer and checkpoints in this process: what tests of single training stages share."""

import contextlib
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import PartialState
from diffusers import FlowMatchEulerDiscreteScheduler

from dopsd.checkpoints import Checkpoints
from dopsd.data.order import Sample
from dopsd.lora_roles import StudentTeacherLoRA
from dopsd.prior import PriorPrompts
from dopsd.products import LoRAFile
from dopsd.rollout import seeded_noise
from dopsd.settings import Settings, TrainingSettings
from dopsd.step import StudentVelocity, TrainingStep
from dopsd.training_state import AdapterState
from short_runs import default_settings, one_process
from toy_pipeline import ToyContext, ToyPipeline, ToyTransformer, ToyVAE


NO_PRIOR = PriorPrompts()
SIZE = (64, 32)  # height, width in pixels


class ToyTraining:
    """The parts of a run that a checkpoint saves.

    Args:
        seed: of the transformer's and the LoRA's weights.
        scaler: gradient scaler, as in fp16 runs.
        lora: keyword arguments of `StudentTeacherLoRA`.
    """

    def __init__(self, seed: int = 0, scaler: torch.amp.GradScaler | None = None, **lora: Any):
        PartialState()  # accelerate's logger asks it which process this is
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.pipeline = ToyPipeline(
                FlowMatchEulerDiscreteScheduler(), ToyVAE(), None, None, ToyTransformer(width=16)
            )
            options = {"rank": 2, "alpha": 4} | lora
            self.roles = StudentTeacherLoRA(self.pipeline.transformer, ["linear_in", "linear_out"], **options)
        self.use_optimizer(torch.optim.AdamW, lr=0.1)
        self.accelerator = one_process(scaler=scaler)

    def use_optimizer(self, kind: type[torch.optim.Optimizer], *, lr: float) -> None:
        """With a schedule that halves the learning rate in each step."""
        self.optimizer = kind(self.roles.student_parameters, lr=lr)
        self.lr_scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, step_size=1, gamma=0.5)

    def step(self) -> None:
        """Changes every weight and every state that a checkpoint holds."""
        for parameter in self.roles.student_parameters:
            parameter.grad = torch.ones_like(parameter)
        self.optimizer.step()
        self.lr_scheduler.step()
        self.roles.update_teacher(0.5)

    def checkpoints(
        self, folder: Path, total_limit: int | None = None, contract: dict[str, Any] | None = None
    ) -> Checkpoints:
        return Checkpoints(
            TrainingSettings(output_dir=str(folder), checkpoints_total_limit=total_limit),
            self.accelerator,
            roles=self.roles,
            state=AdapterState(self.roles, self.optimizer),
            lr_scheduler=self.lr_scheduler,
            product=LoRAFile(ToyPipeline, torch.float32),
            contract=contract or {},
        )


class AccumulatingOptimizer:
    """Steps after the last micro-batch of a step only, as accelerate's optimizer does."""

    def __init__(self, optimizer: torch.optim.Optimizer, accelerator: SimpleNamespace):
        self.optimizer, self.accelerator = optimizer, accelerator
        self.step_was_skipped = False

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    def step(self) -> None:
        if self.accelerator.sync_gradients and not self.step_was_skipped:
            self.optimizer.step()

    def zero_grad(self) -> None:
        if self.accelerator.sync_gradients:
            self.optimizer.zero_grad()


def accumulating_accelerator(accumulation_steps: int, scaler: Any = None) -> SimpleNamespace:
    """Stands in for accelerate in one training step: counts micro-batches, divides losses, records `no_sync`.

    Attributes:
        num_without_sync: calls of `no_sync`.
    """
    accelerator = one_process(scaler=scaler, num_micro_batches=0, num_without_sync=0)

    @contextlib.contextmanager
    def accumulate(model):
        accelerator.num_micro_batches += 1
        accelerator.sync_gradients = accelerator.num_micro_batches % accumulation_steps == 0
        yield

    @contextlib.contextmanager
    def no_sync(model):
        accelerator.num_without_sync += 1
        yield

    accelerator.accumulate, accelerator.no_sync = accumulate, no_sync
    accelerator.sync_gradients = True
    accelerator.backward = lambda loss: (loss / accumulation_steps).backward()
    accelerator.reduce = lambda tensor, reduction: tensor
    accelerator.clip_grad_norm_ = torch.nn.utils.clip_grad_norm_
    return accelerator


class ToyContexts:
    """Contexts of captions 0, 1, ...; the teacher also sees a picture.

    Args:
        batches: each batch of the order, which begins anew after the last one.
        sizes: (height, width) of the examples of another size than `SIZE`.
    """

    cache = None

    def __init__(self, batches: list[list[Sample]], sizes: dict[int, tuple[int, int]] | None = None):
        self.sizes = sizes or {}
        order = SimpleNamespace(batch=lambda place: batches[place % len(batches)])
        self.data = SimpleNamespace(bucket=self.size, order=order, is_editing=False)

    def size(self, sample: Sample) -> tuple[int, int]:
        return self.sizes.get(sample.example, SIZE)

    def student(self, prompts: list[str], cond_images: None = None) -> ToyContext:
        return ToyContext(seeded_noise((16,), [zlib.crc32(prompt.encode()) for prompt in prompts]))

    def load(self, samples: list[Sample], *, num_copies: int = 1) -> tuple[ToyContext, ToyContext]:
        prompts = seeded_noise((16,), [sample.example for sample in samples])
        height, width = self.size(samples[0])
        pictures = seeded_noise((3, height // 16, width // 16), [100 + sample.example for sample in samples])
        teacher = ToyContext(prompts.repeat(num_copies, 1), pictures.repeat(num_copies, 1, 1, 1))
        return ToyContext(prompts), teacher


def make_settings(**flags: Any) -> Settings:
    flags.setdefault("num_trained_states", flags.get("num_rollout_steps", 4))
    return default_settings(**{"seed": 0, "max_train_steps": 9} | flags)


def make_step(
    training: ToyTraining,
    data: list[list[Sample]] | ToyContexts,
    accumulation_steps: int,
    prior: PriorPrompts = NO_PRIOR,
    **flags: Any,
) -> TrainingStep:
    """The training step.

    Args:
        data: the batches of the order, or contexts.
    """
    training.accelerator = accumulating_accelerator(accumulation_steps, training.accelerator.scaler)
    return TrainingStep(
        make_settings(gradient_accumulation_steps=accumulation_steps, **flags),
        training.accelerator,
        pipeline=training.pipeline,
        roles=training.roles,
        contexts=data if isinstance(data, ToyContexts) else ToyContexts(data),
        student=StudentVelocity(training.pipeline),
        optimizer=AccumulatingOptimizer(training.optimizer, training.accelerator),
        lr_scheduler=training.lr_scheduler,
        prior=prior,
    )


def sample(example: int) -> Sample:
    return Sample(example, epoch=0, caption=0, flip=False)
