"""Reading and loading a pretrained checkpoint: its configurations first, its components when they are needed."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from diffusers import BitsAndBytesConfig, DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from safetensors import SafetensorError
from transformers import AutoConfig, PretrainedConfig

from .context_cache import checkpoint_fingerprint
from .errors import InputError, first_line, one_line
from .model import FewStepPipeline, Model
from .roles import StudentTeacherLoRA
from .settings import ModelSettings


logger = get_logger(__name__)

COMPONENTS = ("transformer", "text_encoder", "tokenizer", "vae", "scheduler")


def hub_options(settings: ModelSettings) -> dict[str, Any]:
    return {"revision": settings.revision, "cache_dir": settings.cache_dir}


@contextmanager
def reporting_load_errors(settings: ModelSettings) -> Iterator[None]:
    """Turns the error for a missing or damaged file of the checkpoint into an `InputError`."""
    try:
        yield
    except InputError:
        raise
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(
            f"--pretrained_model_name_or_path {settings.pretrained_model_name_or_path}: cannot be loaded "
            f"({first_line(error)}); check its files and --variant, --revision"
        ) from error


def read_configs(
    name_or_path: str, pipeline_class: type[DiffusionPipeline], *, model: str, example: str, **kwargs
) -> tuple[dict, dict]:
    """Reads the checkpoint's model_index.json and its scheduler's configuration.

    Args:
        name_or_path: hub id or folder.
        pipeline_class: the pipeline that model_index.json must name.
        model, example: what to call the model in an error, and a hub id of it.
        kwargs: passed to `load_config`, such as revision and cache_dir.

    Raises:
        InputError: there is no such checkpoint, or it belongs to another model or scheduler.
    """
    flag = f"--pretrained_model_name_or_path {name_or_path}"
    try:
        config = pipeline_class.load_config(name_or_path, **kwargs)
        scheduler = FlowMatchEulerDiscreteScheduler.load_config(name_or_path, subfolder="scheduler", **kwargs)
    except (OSError, ValueError) as error:
        reason = one_line(error)
        is_local = Path(name_or_path).exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(name_or_path))
        problem = (
            "this is not the folder of a diffusers checkpoint (with a model_index.json); check the path"
            if is_local
            else "there is no such folder, and it could not be read from the Hub; check the name and the connection, "
            "and for a gated model accept its license there and run hf auth login"
        )
        raise InputError(f"{flag}: {problem} ({reason})") from error
    if (kind := config.get("_class_name")) != pipeline_class.__name__:
        raise InputError(f"{flag}: this is a {kind}, not {model}; pass for example {example}")
    if scheduler.get("stochastic_sampling") or scheduler.get("_class_name") != "FlowMatchEulerDiscreteScheduler":
        raise InputError(
            f"{flag}: its scheduler is not a deterministic FlowMatchEulerDiscreteScheduler, whose steps the rollout "
            "follows; use the published scheduler"
        )
    return config, scheduler


def check_pretrained(model: Model, settings: ModelSettings) -> None:
    """Checks, by its configurations alone, that the checkpoint is one of `model`; warns if it is not distilled."""
    name = settings.pretrained_model_name_or_path
    index, scheduler = read_configs(
        name, model.stock_pipeline_class, model=model.name, example=model.example, **hub_options(settings)
    )
    if not model.is_distilled(index, scheduler):
        logger.warning(
            f"{name} does not look step-distilled: D-OPSD preserves few-step sampling but cannot create it. Samples "
            "at --num_rollout_steps steps will stay as poor as the base model's."
        )


def model_identity(settings: ModelSettings) -> str:
    """Identifies a folder by its content, wherever it is, and a hub checkpoint by its name and revision."""
    folder = Path(settings.pretrained_model_name_or_path)
    if folder.is_dir():
        return checkpoint_fingerprint(folder, COMPONENTS)[:16]
    return f"{settings.pretrained_model_name_or_path}@{settings.revision or 'main'}"


def encoders_fingerprint(folder: Path) -> str:
    """Identifies everything in the checkpoint that encodings depend on."""
    return checkpoint_fingerprint(folder, ("text_encoder", "tokenizer", "vae"))


def load_skeleton(model: Model, settings: ModelSettings) -> torch.nn.Module:
    with reporting_load_errors(settings):
        return transformer_skeleton(
            model.transformer_class, settings.pretrained_model_name_or_path, **hub_options(settings)
        )


def transformer_skeleton(transformer_class: type, name_or_path: str, **kwargs) -> torch.nn.Module:
    """The transformer on the meta device: its configuration and module names, without reading a weight."""
    config = transformer_class.load_config(name_or_path, subfolder="transformer", **kwargs)
    with torch.device("meta"):
        return transformer_class.from_config(config)


def open_pipeline(
    model: Model, settings: ModelSettings, dtype: torch.dtype
) -> tuple[FewStepPipeline, Path, PretrainedConfig]:
    """The pipeline without its text encoder and transformer, which are loaded when they are needed.

    Returns:
        The pipeline, the checkpoint's folder (downloaded without the transformer), the text encoder's configuration.
    """
    name = settings.pretrained_model_name_or_path
    with reporting_load_errors(settings):
        folder = Path(name)
        if not folder.is_dir():
            options = hub_options(settings)
            folder = Path(model.pipeline_class.download(name, transformer=None, variant=settings.variant, **options))
        text_config = AutoConfig.from_pretrained(folder, subfolder="text_encoder")
        pipeline = model.pipeline_class.from_pretrained(
            folder, transformer=None, text_encoder=None, dtype=dtype, variant=settings.variant
        )
    return pipeline, folder, text_config


def load_text_encoder(model: Model, settings: ModelSettings, folder: Path, dtype: torch.dtype) -> torch.nn.Module:
    """The text encoder from the checkpoint's `folder`."""
    with reporting_load_errors(settings):
        return model.text_encoder_class.from_pretrained(
            folder, subfolder="text_encoder", dtype=dtype, variant=settings.variant
        )


def read_quantization_settings(settings: ModelSettings) -> dict | None:
    """Arguments for `BitsAndBytesConfig` from `--bnb_quantization_config_path`; None without the flag."""
    path = settings.bnb_quantization_config_path
    if path is None:
        return None
    try:
        arguments = json.loads(Path(path).read_text(encoding="utf-8"))
        kinds = [kind for kind in ("load_in_4bit", "load_in_8bit") if arguments.get(kind)]
        if len(kinds) != 1:
            raise ValueError("it sets neither or both of load_in_4bit and load_in_8bit")
        BitsAndBytesConfig(**arguments)
    except (OSError, ValueError, TypeError, AttributeError, ImportError) as error:
        raise InputError(
            f"--bnb_quantization_config_path {path}: cannot be used ({first_line(error)}); give a JSON file with the "
            'arguments of BitsAndBytesConfig, such as {"load_in_4bit": true, "bnb_4bit_quant_type": "nf4"}'
        ) from error
    if not torch.cuda.is_available():
        raise InputError(f"--bnb_quantization_config_path {path}: quantized weights need a GPU; drop the flag")
    return arguments


def check_quantization(settings: ModelSettings) -> None:
    """Raises `InputError` if `--bnb_quantization_config_path` cannot be used."""
    read_quantization_settings(settings)


def load_transformer(model: Model, settings: ModelSettings, dtype: torch.dtype) -> torch.nn.Module:
    quantization = read_quantization_settings(settings)
    if quantization is not None and quantization.get("load_in_4bit"):
        quantization["bnb_4bit_compute_dtype"] = dtype
    with reporting_load_errors(settings):
        return model.transformer_class.from_pretrained(
            settings.pretrained_model_name_or_path,
            subfolder="transformer",
            dtype=dtype,
            variant=settings.variant,
            quantization_config=None if quantization is None else BitsAndBytesConfig(**quantization),
            **hub_options(settings),
        )


def read_init_lora(
    model: Model, name_or_path: str | None, skeleton: torch.nn.Module, lora_options: dict[str, Any]
) -> tuple[dict[str, torch.Tensor], dict | None] | None:
    """Weights and metadata of `--init_lora`, as diffusers reads them; None without the flag.

    Args:
        skeleton: the transformer on the meta device.
        lora_options: of the LoRA that will be trained, for `StudentTeacherLoRA`.

    Raises:
        InputError: there is no LoRA, or it does not fit the one that will be trained.
    """
    if name_or_path is None:
        return None
    try:
        weights, metadata = model.stock_pipeline_class.lora_state_dict(name_or_path, return_lora_metadata=True)
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(
            f"--init_lora {name_or_path}: no LoRA is found there ({first_line(error)}); give a .safetensors file, its "
            "folder or a hub id"
        ) from error
    StudentTeacherLoRA(skeleton, **lora_options, teacher="base").check_lora(weights, origin=name_or_path)
    return weights, metadata
