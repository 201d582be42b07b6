"""A toy model's LoRA, optimizer and checkpoints in this process: what tests of single training stages share."""

import contextlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import PartialState
from diffusers import FlowMatchEulerDiscreteScheduler

from dopsd.checkpoints import Checkpoints
from dopsd.roles import StudentTeacherLoRA
from dopsd.settings import TrainingSettings
from short_runs import one_process
from toy_pipeline import ToyPipeline, ToyTransformer, ToyVAE


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
            optimizer=self.optimizer,
            lr_scheduler=self.lr_scheduler,
            stock_pipeline_class=ToyPipeline,
            save_dtype=torch.float32,
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
