"""Starting a run: accelerate, logging, seed."""

import logging
import os
import random
from collections import Counter
from datetime import timedelta
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
    DistributedType,
    InitProcessGroupKwargs,
    ProjectConfiguration,
    broadcast_object_list,
    str_to_bool,
)

from .attention import check_attention_backend
from .data.training_data import TrainingData
from .errors import InputError, device_errors, first_line
from .exam.examiner import open_exam_model
from .model import Model
from .resuming import read_state
from .roles import Roles
from .settings import Settings
from .terminal import without_tokens


logger = get_logger(__name__)

# Kept until the interpreter exits. If DDP's reducer is the last to hold the process group, its destructor waits for
# gloo's thread while it holds the GIL, and the process hangs if that thread is just releasing a tensor.
_process_groups = []

# Modes of accelerate in which a process may hold a part of the model only. The scripts shard it themselves.
UNSUPPORTED_MODES = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism configuration",
}
SUPPORTED_MODES = "one process, or several with one GPU each (see configs/; --fsdp shares the weights)"

# Processes wait for one another while pictures and prompts are encoded and images are drawn. NCCL gives up after 10
# minutes by default.
PROCESS_GROUP_TIMEOUT = timedelta(hours=12)


def start_accelerator(settings: Settings, model: Model) -> Accelerator:
    """The accelerator, with logging set up.

    Raises:
        InputError: flags and accelerate's own configuration do not fit together, or do not fit the model or device.
    """
    training = settings.training
    for variable, mode in UNSUPPORTED_MODES.items():
        if str_to_bool(os.environ.get(variable) or "false"):
            raise InputError(f"accelerate is configured for {mode}: supported are {SUPPORTED_MODES}")
    try:
        accelerator = Accelerator(
            gradient_accumulation_steps=training.gradient_accumulation_steps,
            mixed_precision=training.mixed_precision,
            log_with=None if training.report_to == "none" else training.report_to,
            project_config=ProjectConfiguration(
                project_dir=training.output_dir, logging_dir=str(Path(training.output_dir, training.logging_dir))
            ),
            kwargs_handlers=[
                # The frozen model runs in its deployed precision; `AdaptedLinear` casts its own weights.
                AutocastKwargs(enabled=False),
                DistributedDataParallelKwargs(broadcast_buffers=False),
                InitProcessGroupKwargs(timeout=PROCESS_GROUP_TIMEOUT),
            ],
        )
    except device_errors():
        raise
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        raise InputError(
            f"accelerate cannot start with its configuration ({first_line(error)}): supported are {SUPPORTED_MODES}"
        ) from error
    if torch.distributed.is_initialized():
        _process_groups.append(torch.distributed.group.WORLD)
    set_up_logging()
    check_accelerator(accelerator, settings, model)
    if (backend := settings.performance.attention_backend) is not None:
        masked = model.masks_attention and training.train_batch_size > 1
        check_attention_backend(backend, accelerator.device, weight_dtype(accelerator.mixed_precision), masked=masked)
    open_exam_model(settings)
    if training.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
    return accelerator


def check_accelerator(accelerator: Accelerator, settings: Settings, model: Model) -> None:
    """Raises `InputError` for what the scripts or the model cannot do; warns of what costs memory or quality."""
    mode = accelerator.distributed_type
    is_mpi = mode != DistributedType.NO and torch.distributed.get_backend() == "mpi"
    if is_mpi or not (mode == DistributedType.NO or mode.value.startswith("MULTI_")):
        raise InputError(
            f"accelerate is configured for {'MPI' if is_mpi else mode.value}: supported are {SUPPORTED_MODES}"
        )
    if settings.performance.fsdp and accelerator.num_processes == 1:
        raise InputError(
            "--fsdp: shares the weights among processes, and there is only one; start one process per GPU (see "
            "configs/), or pass --offload_transformer instead"
        )
    if settings.full.ema_device == "cuda" and accelerator.device.type != "cuda":
        raise InputError("--ema_device cuda: there is no GPU; pass auto or cpu")
    if settings.full.is_full and accelerator.num_processes > 1 and not settings.performance.fsdp:
        raise InputError("--train_mode full: with several processes, pass --fsdp, so that they share the model")
    if settings.full.is_full and settings.performance.is_sharded and accelerator.device.type != "cpu":
        if accelerator.num_processes > 1 and settings.performance.offload_transformer:
            raise InputError(
                "--offload_transformer: cannot be combined with --train_mode full and --fsdp on GPUs, which cannot "
                "sum gradients in host memory; drop it"
            )
    precision, on_gpu = accelerator.mixed_precision, accelerator.device.type != "cpu"
    if precision not in ("no", "fp16", "bf16"):
        raise InputError(f"--mixed_precision {precision}: is not supported; pass bf16, fp16 or no")
    accumulation_steps = settings.training.gradient_accumulation_steps
    if accelerator.gradient_accumulation_steps != accumulation_steps:
        raise InputError(
            f"--gradient_accumulation_steps {accumulation_steps}: accelerate is configured for "
            f"{accelerator.gradient_accumulation_steps}; pass the same, or change accelerate's configuration"
        )
    if precision == "fp16" and settings.full.is_full:
        raise InputError("--train_mode full: cannot be trained in fp16, which accelerate is configured for; pass bf16")
    if precision != "bf16" and settings.full.rounds_at_random:
        raise InputError(
            f"--bf16_update {settings.full.bf16_update}: goes with --mixed_precision bf16; pass that, or drop the flag"
        )
    if precision == "fp16" and not model.works_in_fp16:
        raise InputError(
            f"--mixed_precision fp16: the activations of {model.name} overflow in it, and images turn black; use "
            "bf16, or no on a GPU without bf16"
        )
    if precision == "fp16" and not on_gpu:
        raise InputError("--mixed_precision fp16: has no gradient scaler on a CPU; use bf16 or no")
    if precision == "fp16":
        logger.warning("--mixed_precision fp16: can overflow; prefer bf16 on Ampere and later GPUs")
    if precision == "no" and on_gpu:
        logger.warning(
            f"--mixed_precision no: the {'' if settings.full.is_full else 'frozen '}model is loaded in float32, which "
            "takes twice the memory of bf16 and several times as long; pass --mixed_precision bf16"
        )


def set_up_logging() -> None:
    """Logs to the terminal, without tokens and without other libraries' routine messages."""
    logging.basicConfig(
        format="%(asctime)s - %(levelname)s - %(message)s", datefmt="%m/%d/%Y %H:%M:%S", level=logging.INFO
    )
    for handler in logging.getLogger().handlers:
        handler.addFilter(hide_tokens)
    for library in (transformers, diffusers, datasets):
        library.utils.logging.set_verbosity_error()
    for name in ("httpx", "httpx2"):  # one line per request; which one depends on huggingface_hub's version
        logging.getLogger(name).setLevel(logging.WARNING)
    # One line per 8-bit matrix product: "inputs will be cast from torch.bfloat16 to float16".
    logging.getLogger("bitsandbytes.autograd._functions").addFilter(
        lambda record: not record.getMessage().startswith("MatMul8bitLt: inputs will be cast")
    )


def hide_tokens(record: logging.LogRecord) -> bool:
    """A logging filter that replaces access tokens in the message. Keeps every record."""
    record.msg, record.args = without_tokens(record.getMessage()), None
    return True


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


def log_plan(settings: Settings, accelerator: Accelerator, data: TrainingData, roles: Roles, first_step: int) -> None:
    """Logs what will be trained, on what and for how long."""
    training = settings.training
    pictures_per_step = data.pictures_per_step(settings, accelerator.num_processes)
    logger.info(f"Training {roles.describe()}")
    logger.info(f"Pictures: {len(data.pictures)}; batches per epoch: {data.order.num_batches}")
    checkpointing = "on" if settings.performance.gradient_checkpointing else "off"
    kind = settings.model.quantize or (settings.model.bnb_quantization_config_path and "fewer bits by bitsandbytes")
    blocks = f", its blocks in {kind}" if kind else ""
    logger.info(f"Precision of the model: {training.mixed_precision}{blocks}; gradient checkpointing: {checkpointing}")
    logger.info(
        f"Pictures per step over all processes: {pictures_per_step:.3g}; steps: {first_step} to "
        f"{training.max_train_steps}"
    )
    order = data.order
    if order.mean_batch_size < training.train_batch_size:
        counts = Counter()
        for shape, members in order.members.items():
            counts[shape.bucket] += len(members)
        counts = ", ".join(f"{height}x{width}: {count}" for (height, width), count in sorted(counts.items()))
        logger.warning(
            f"--train_batch_size {training.train_batch_size}: batches hold {order.mean_batch_size:.3g} pictures on "
            f"average, because pictures of different sizes are not mixed (height x width: pictures, repeats included: "
            f"{counts})"
        )
