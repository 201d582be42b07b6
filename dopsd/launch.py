"""Starting a run: accelerate, logging, seed."""

import logging
import random
from pathlib import Path

import datasets
import diffusers
import torch
import transformers
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import (
    AutocastKwargs,
    DistributedDataParallelKwargs,
    ProjectConfiguration,
    broadcast_object_list,
)

from .checkpoints import read_state
from .data.training_data import TrainingData
from .errors import InputError
from .roles import StudentTeacherLoRA
from .settings import Settings, TrainingSettings


logger = get_logger(__name__)

# Kept until the interpreter exits. If DDP's reducer is the last to hold the process group, its destructor waits for
# gloo's thread while it holds the GIL, and the process hangs if that thread is just releasing a tensor.
_process_groups = []


def start_accelerator(settings: TrainingSettings) -> Accelerator:
    """The accelerator, with logging set up.

    Raises:
        InputError: flags and accelerate's own configuration do not fit together, or do not fit the device.
    """
    accelerator = Accelerator(
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        mixed_precision=settings.mixed_precision,
        log_with=None if settings.report_to == "none" else settings.report_to,
        project_config=ProjectConfiguration(
            project_dir=settings.output_dir, logging_dir=str(Path(settings.output_dir, settings.logging_dir))
        ),
        kwargs_handlers=[
            # The frozen model runs in its deployed precision; the adapters cast their own weights (`CastLinear`).
            AutocastKwargs(enabled=False),
            DistributedDataParallelKwargs(broadcast_buffers=False),
        ],
    )
    if torch.distributed.is_initialized():
        _process_groups.append(torch.distributed.group.WORLD)
    if accelerator.mixed_precision not in ("no", "fp16", "bf16"):
        raise InputError(f"--mixed_precision {accelerator.mixed_precision}: pass bf16, fp16 or no")
    if accelerator.gradient_accumulation_steps != settings.gradient_accumulation_steps:
        raise InputError(
            f"--gradient_accumulation_steps {settings.gradient_accumulation_steps}: accelerate is configured for "
            f"{accelerator.gradient_accumulation_steps}; pass the same, or change accelerate's configuration"
        )
    if accelerator.device.type == "cpu" and accelerator.mixed_precision == "fp16":
        raise InputError("--mixed_precision fp16: has no gradient scaler on a CPU; use bf16 or no")
    logging.basicConfig(
        format="%(asctime)s - %(levelname)s - %(message)s", datefmt="%m/%d/%Y %H:%M:%S", level=logging.INFO
    )
    for library in (transformers, diffusers, datasets):
        library.utils.logging.set_verbosity_error()
    if settings.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
    return accelerator


def weight_dtype(mixed_precision: str) -> torch.dtype:
    """dtype of the frozen model."""
    return {"fp16": torch.float16, "bf16": torch.bfloat16}.get(mixed_precision, torch.float32)


def resolve_seed(seed: int | None, checkpoint: Path | None) -> int:
    """`--seed`, or the checkpoint's, or a random one that all processes share."""
    if seed is None and checkpoint is not None:
        seed = read_state(checkpoint)["settings"]["--seed"]
    if seed is None:
        seed = broadcast_object_list([random.SystemRandom().randrange(2**31)])[0]
        logger.info(f"No --seed was given; using --seed {seed}")
    return seed


def start_trackers(accelerator: Accelerator, tracker_name: str, settings: Settings) -> None:
    """Starts the trackers with the run's settings, without the token."""
    shown = {name: str(value) for name, value in settings.flat().items() if name != "hub_token"}
    accelerator.init_trackers(tracker_name, config=shown)


def log_plan(
    settings: Settings, accelerator: Accelerator, data: TrainingData, roles: StudentTeacherLoRA, first_step: int
) -> None:
    """Logs what will be trained, on what and for how long."""
    training = settings.training
    count = sum(parameter.numel() for parameter in roles.student_parameters)
    total_batch = training.pictures_per_step(accelerator.num_processes)
    logger.info(f"Training {len(roles.module_names)} modules, {count:,} parameters, rank {settings.lora.rank}")
    logger.info(f"Pictures: {len(data.pictures)}; batches per epoch: {data.order.num_batches}")
    checkpointing = "on" if training.gradient_checkpointing else "off"
    logger.info(f"Precision of the frozen model: {training.mixed_precision}; gradient checkpointing: {checkpointing}")
    logger.info(
        f"Pictures per step over all processes: {total_batch}; steps: {first_step} to {training.max_train_steps}"
    )
