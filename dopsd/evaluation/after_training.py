"""--evaluate: a finished run's LoRA is compared with the base by evaluate_lora.py, in a process of its own."""

import os
import re
import shlex
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from diffusers import DiffusionPipeline
from diffusers.training_utils import free_memory

from ..errors import InputError, first_line
from ..settings import Settings
from .comparison import Comparison
from .results import RESULTS_FILE, read_results
from .settings import EvaluationSettings, parse_settings


logger = get_logger(__name__)

SCRIPT = Path(__file__).parents[2] / "evaluate_lora.py"
EVALUATION_DIR = "evaluation"
# Flags that --evaluate_with cannot change: they are what makes it this run's evaluation.
GIVEN = ("pretrained_model_name_or_path", "revision", "variant", "kind", "output_dir")
# What launchers tell the processes of a run about each other; the evaluation is a single one.
LAUNCHED = re.compile(r"RANK|WORLD_SIZE|(LOCAL|GROUP|ROLE|MASTER|TORCHELASTIC)_\w+")


def check_evaluation(settings: Settings) -> None:
    """Checks the flags of the evaluation before training, as far as no file is needed.

    Raises:
        InputError: one of them cannot be used.
        SystemExit: the same, as argparse reports it, in one line.
    """
    kind, given = settings.evaluation.evaluate, settings.evaluation.evaluate_with
    if kind is None:
        if given is not None:
            raise InputError("--evaluate_with: goes with --evaluate; add that, or drop the flag")
        return
    flag = f"--evaluate {kind}"
    if settings.full.is_full and settings.full.extract_lora is None:
        raise InputError(f"{flag}: compares LoRAs; drop it, or save one of the whole model with --extract_lora")
    added = added_flags(settings)
    if settings.data.instance_data_dir is None and "instance_data_dir" not in added:
        raise InputError(
            f"{flag}: reads the training pictures from a folder; name one with --instance_data_dir, or with "
            "--evaluate_with instance_data_dir=FOLDER"
        )
    try:
        parse_settings({"default_vlm": "", "deployed_steps": ""}, "", evaluation_flags(settings))
    except InputError as error:
        raise InputError(f"{flag}: {error}") from error


def evaluate_run(
    settings: Settings, pipeline: DiffusionPipeline, optimizer: torch.optim.Optimizer
) -> Comparison | None:
    """Runs evaluate_lora.py on the LoRA that the run has saved. If it fails, that is a warning in the log.

    Args:
        pipeline: is moved off the accelerator first, and is of no use afterwards.
        optimizer: loses its state, for the same reason.

    Returns:
        What was found; None without `--evaluate`, or if it failed.
    """
    kind = settings.evaluation.evaluate
    if kind is None:
        return None
    optimizer.state.clear()
    if not settings.performance.is_sharded:
        release(pipeline)
    command = [sys.executable, str(SCRIPT), *evaluation_flags(settings)]
    line = shlex.join(["python", *command[1:]])
    logger.info(f"Evaluating the LoRA: {line}")
    try:
        code = subprocess.run(command, env=environment(), check=False).returncode
        if code == 0:
            return read_results(evaluation_folder(settings) / RESULTS_FILE)
        problem = f"evaluate_lora.py ended with exit status {code}"
    except (OSError, InputError) as error:
        problem = first_line(error)
    logger.warning(f"--evaluate {kind}: {problem}; the weights are saved. To evaluate them later: {line}")
    return None


def release(pipeline: DiffusionPipeline) -> None:
    """Moves what a run still has on the accelerator to the CPU, so that another process can draw there."""
    for component in pipeline.components.values():
        if isinstance(component, torch.nn.Module):
            torch.nn.Module.to(component, "cpu")  # diffusers' own `to` refuses some quantized models
    free_memory()


def environment() -> dict[str, str]:
    """This process's, without what its launcher has added."""
    return {name: value for name, value in os.environ.items() if not LAUNCHED.fullmatch(name)}


def evaluation_folder(settings: Settings) -> Path:
    return Path(settings.training.output_dir, EVALUATION_DIR)


def evaluation_flags(settings: Settings) -> list[str]:
    """The command line of evaluate_lora.py. Raises `InputError` if `--evaluate_with` cannot be used."""
    values = own_flags(settings)
    for name, added in added_flags(settings).items():
        values[name] = [*values["lora"], *added] if name == "lora" else added
    known = {name: value if isinstance(value, list) else [value] for name, value in values.items()}
    return [
        text for name, some in known.items() if some not in ([None], []) for text in (f"--{name}", *map(str, some))
    ]


def own_flags(settings: Settings) -> dict[str, Any]:
    """What follows from the run: flag without dashes -> value, or list of values, or None for the default."""
    model, data, validation = settings.model, settings.data, settings.validation
    folder = Path(settings.training.output_dir)
    to_edit = [path for paths in validation.validation_image or [] for path in paths.split(",")]
    return {
        "pretrained_model_name_or_path": model.pretrained_model_name_or_path,
        "revision": model.revision,
        "variant": model.variant,
        "cache_dir": model.cache_dir,
        "mixed_precision": settings.training.mixed_precision,
        "lora": [f"{folder.resolve().name.replace('=', '-')}={folder}"],
        "instance_data_dir": data.instance_data_dir,
        "instance_prompt": data.instance_prompt,
        "image_column": data.image_column,
        "caption_column": data.caption_column,
        "cond_image_column": data.cond_image_column,
        "kind": settings.evaluation.evaluate,
        "trigger_word": (settings.prior.trigger_word or [None])[0],
        "validation_image": list(dict.fromkeys(to_edit)),
        "seed": settings.training.seed,
        "num_inference_steps": validation.num_inference_steps,
        "height": validation.validation_height,
        "width": validation.validation_width,
        "max_sequence_length": model.max_sequence_length,
        "output_dir": evaluation_folder(settings),
    }


def added_flags(settings: Settings) -> dict[str, list[str]]:
    """Those of `--evaluate_with`, without dashes -> values. Raises `InputError` if one is none, or is not free."""
    known = {item.name for item in fields(EvaluationSettings)}
    added: dict[str, list[str]] = {}
    for text in settings.evaluation.evaluate_with or []:
        name, has_value, value = text.partition("=")
        name = name.strip().removeprefix("--")
        if not has_value:
            raise InputError(f"--evaluate_with {text}: write NAME=VALUE, such as num_seeds=8")
        if name not in known:
            raise InputError(f"--evaluate_with {text}: evaluate_lora.py has no flag --{name}; see its --help")
        if name in GIVEN:
            raise InputError(f"--evaluate_with {text}: --{name} follows from the run; drop it")
        added.setdefault(name, []).append(value)
    return added
