"""What a checkpoint is, read from its configurations alone: before anything is loaded."""

import re
from pathlib import Path

from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler

from .errors import InputError


def read_configs(
    name_or_path: str, pipeline_class: type[DiffusionPipeline], *, model: str, example: str, **kwargs
) -> tuple[dict, dict]:
    """The checkpoint's index and its scheduler's configuration.

    Args:
        name_or_path: hub id or folder.
        pipeline_class: what the index must name.
        model, example: what to call the model in an error, and a hub id of it.
        kwargs: of `load_config`, such as revision and cache_dir.

    Raises:
        InputError: no such checkpoint, or one of another model or scheduler.
    """
    flag = f"--pretrained_model_name_or_path {name_or_path}"
    try:
        config = pipeline_class.load_config(name_or_path, **kwargs)
        scheduler = FlowMatchEulerDiscreteScheduler.load_config(name_or_path, subfolder="scheduler", **kwargs)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        is_local = Path(name_or_path).exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(name_or_path))
        advice = (
            "it is no folder of a diffusers checkpoint (with a model_index.json); check the path"
            if is_local
            else "there is no such folder, and the Hub did not give it; check the name and the connection, and for a "
            "gated model accept its licence there and run hf auth login"
        )
        raise InputError(f"{flag}: {advice} ({reason})") from error
    if (kind := config.get("_class_name")) != pipeline_class.__name__:
        raise InputError(f"{flag}: this is a {kind}, not {model}; pass for example {example}")
    if scheduler.get("stochastic_sampling") or scheduler.get("_class_name") != "FlowMatchEulerDiscreteScheduler":
        raise InputError(
            f"{flag}: its scheduler is not a deterministic FlowMatchEulerDiscreteScheduler, whose steps the rollout "
            "follows; use the published scheduler"
        )
    return config, scheduler
