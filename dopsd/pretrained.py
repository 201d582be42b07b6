"""Reading and loading a pretrained checkpoint: its configurations first, its components when they are needed."""

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import safetensors
import torch
from accelerate.logging import get_logger
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from transformers import AutoConfig, PretrainedConfig

from .context_cache import checkpoint_fingerprint, content_key
from .errors import InputError, naming_flag
from .loading import (
    LOAD_ERRORS,
    brief,
    check_config,
    check_loaded,
    check_text_config,
    check_tokenizer,
    check_weight_files,
    limited_size,
    load_tokenizer,
    read_config,
    reporting_load_errors,
)
from .memory import log_host_memory
from .model import FewStepPipeline, Model
from .quantization import (
    check_quantization,
    forget_dequantized_weights,
    text_encoder_quantization,
    transformer_quantization,
)
from .settings import QUANTIZATION_PACKAGES, ModelSettings


logger = get_logger(__name__)

COMPONENTS = ("transformer", "text_encoder", "tokenizer", "vae", "scheduler")


def hub_options(settings: ModelSettings) -> dict[str, Any]:
    return {"revision": settings.revision, "cache_dir": settings.cache_dir}


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
        check_config(scheduler, "scheduler", FlowMatchEulerDiscreteScheduler)
        kind = config.get("_class_name")
    except LOAD_ERRORS as error:
        if Path(name_or_path, "model_index.json").exists():
            problem = "its model_index.json or its scheduler cannot be used; download them again"
        elif Path(name_or_path).exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(name_or_path)):
            problem = "this is not the folder of a diffusers checkpoint (with a model_index.json); check the path"
        else:
            problem = (
                "there is no such folder, and it could not be read from the Hub; check the name and the connection, "
                "and for a gated model accept its license there and run hf auth login"
            )
        raise InputError(f"{flag}: {problem} ({brief(error)})") from error
    if kind != pipeline_class.__name__:
        raise InputError(f"{flag}: this is a {brief(kind, 60)}, not {model}; pass for example {example}")
    if scheduler.get("stochastic_sampling") or scheduler.get("_class_name") != "FlowMatchEulerDiscreteScheduler":
        raise InputError(
            f"{flag}: its scheduler is not a deterministic FlowMatchEulerDiscreteScheduler, whose steps the rollout "
            "follows; use the published scheduler"
        )
    return config, scheduler


def check_pretrained(model: Model, settings: ModelSettings) -> None:
    """Checks, by its configurations alone, that the checkpoint is one of `model`; warns if it is not distilled.

    Raises:
        InputError: it is not, or its weights cannot be quantized as `settings` say.
    """
    check_quantization(settings)
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


def encoder_fingerprints(folder: Path, settings: ModelSettings) -> dict[str, str]:
    """`Encoder.component` -> what identifies everything in the checkpoint that its encodings depend on."""
    fingerprint = checkpoint_fingerprint(folder, ("text_encoder", "tokenizer", "vae"))
    kind = settings.quantize_text_encoder
    return {"text_encoder": fingerprint if kind is None else content_key(fingerprint, kind), "vae": fingerprint}


def load_skeleton(model: Model, settings: ModelSettings) -> torch.nn.Module:
    name = settings.pretrained_model_name_or_path
    with reporting_load_errors(settings):
        skeleton = transformer_skeleton(model.transformer_class, name, **hub_options(settings))
        if Path(name).is_dir():
            check_weight_files(Path(name), "transformer", settings.variant)
        return skeleton


def transformer_skeleton(transformer_class: type, name_or_path: str, **kwargs) -> torch.nn.Module:
    """The transformer on the meta device: its configuration and module names, without reading a weight."""
    config = transformer_class.load_config(name_or_path, subfolder="transformer", **kwargs)
    check_config(config, "transformer", transformer_class)
    with torch.device("meta"), limited_size():
        return transformer_class.from_config(config)


def open_pipeline(
    model: Model, settings: ModelSettings, dtype: torch.dtype
) -> tuple[FewStepPipeline, Path, PretrainedConfig]:
    """The pipeline without its text encoder and transformer, which are loaded when they are needed.

    Returns:
        The pipeline, the checkpoint's folder (downloaded without the transformer), the text encoder's configuration.

    Raises:
        InputError: a file is missing or damaged, or would run code.
    """
    name = settings.pretrained_model_name_or_path
    with reporting_load_errors(settings):
        folder = Path(name)
        if not folder.is_dir():
            folder = Path(
                model.pipeline_class.download(
                    name,
                    transformer=None,
                    variant=settings.variant,
                    use_safetensors=True,
                    trust_remote_code=False,
                    **hub_options(settings),
                )
            )
        read_text_config(model, folder)  # What is wrong with it is said before what is wrong with weights.
        check_weight_files(folder, "text_encoder", settings.variant)
    vae = partial(load_vae, model, settings, folder, dtype)
    pipeline, text_config = assemble_pipeline(model, settings, folder, vae)
    return pipeline, folder, text_config


def assemble_pipeline(
    model: Model, settings: ModelSettings, folder: Path, make_vae: Callable[[], torch.nn.Module]
) -> tuple[FewStepPipeline, PretrainedConfig]:
    """The pipeline from the small files in the checkpoint's `folder`; see `open_pipeline`.

    Raises:
        InputError: a file is missing or damaged, or would run code.
    """
    with reporting_load_errors(settings):
        text_config = read_text_config(model, folder)
        index = model.pipeline_class.load_config(folder)
        tokenizer = load_tokenizer(folder, index["tokenizer"])
        check_tokenizer(tokenizer, text_config)
        pipeline = model.pipeline_class.from_pretrained(
            folder,
            transformer=None,
            text_encoder=None,
            tokenizer=tokenizer,
            vae=make_vae(),
            trust_remote_code=False,
        )
        sigmas = pipeline.schedule(512, 512, 4).sigmas
        if not (sigmas.isfinite().all() and (sigmas.diff() < 0).all()):
            raise ValueError(f"its scheduler's noise levels do not fall: {sigmas.tolist()}")
    with naming_flag(f"--pretrained_model_name_or_path {settings.pretrained_model_name_or_path}:"):
        pipeline.chat_token_count("a photo")  # Tries the chat template.
    return pipeline, text_config


def read_text_config(model: Model, folder: Path) -> PretrainedConfig:
    """The text encoder's configuration. Raises ValueError, or what transformers raises, if it cannot be used."""
    content = read_config(folder / "text_encoder" / "config.json")
    config_class = model.text_encoder_class.config_class
    check_config(content, "text_encoder")
    if (kind := content.get("model_type")) != config_class.model_type:
        raise ValueError(f"its text encoder's model_type is {brief(repr(kind), 60)}, not {config_class.model_type!r}")
    config = AutoConfig.from_pretrained(folder, subfolder="text_encoder", trust_remote_code=False)
    check_text_config(config)
    return config


@contextmanager
def open_weights(folder: Path, variant: str | None) -> Iterator[Callable[[str], torch.Tensor]]:
    """A function that reads one tensor of a component in `folder`, by its name.

    Raises:
        ValueError: by that function, if there is no such tensor.
        OSError, SafetensorError: a file is missing or damaged.
    """
    with ExitStack() as stack:
        file_of = {}
        for path in sorted(folder.glob("*.safetensors")):
            if path.name.count(".") == 1 if variant is None else f".{variant}" in path.name:
                file = stack.enter_context(safetensors.safe_open(path, framework="pt"))
                file_of |= dict.fromkeys(file.keys(), file)

        def read(name: str) -> torch.Tensor:
            if name not in file_of:
                raise ValueError(f"{folder} has no {name}")
            return file_of[name].get_tensor(name)

        yield read


def load_vae(model: Model, settings: ModelSettings, folder: Path, dtype: torch.dtype) -> torch.nn.Module:
    """The VAE from the checkpoint's `folder`, on the CPU. Raises what diffusers raises, or ValueError."""
    check_config(model.vae_class.load_config(folder, subfolder="vae"), "vae", model.vae_class)
    has_variant = any(f".{settings.variant}." in path.name for path in (folder / "vae").iterdir())
    variant = settings.variant if has_variant else None
    check_weight_files(folder, "vae", variant)
    with limited_size():
        vae, info = model.vae_class.from_pretrained(
            folder, subfolder="vae", dtype=dtype, variant=variant, use_safetensors=True, output_loading_info=True
        )
    check_loaded("vae", info)
    return vae


def load_text_encoder(
    model: Model, settings: ModelSettings, folder: Path, dtype: torch.dtype, device: torch.device | None = None
) -> torch.nn.Module:
    """The text encoder from the checkpoint's `folder`, quantized if the settings say so.

    Args:
        device: the accelerator, onto which it is loaded piece by piece; without one, it stays on the CPU.

    Raises:
        InputError: a weight is missing, has another shape, or belongs to another model.
    """
    with reporting_load_errors(settings):
        with limited_size():
            text_encoder, info = model.text_encoder_class.from_pretrained(
                folder,
                subfolder="text_encoder",
                dtype=dtype,
                variant=settings.variant,
                use_safetensors=True,
                trust_remote_code=False,
                device_map=device_map(device),
                quantization_config=text_encoder_quantization(settings, dtype),
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # They are in `info`.
            )
        check_loaded("text_encoder", info)
        return text_encoder


def device_map(device: torch.device | None) -> dict[str, torch.device] | None:
    """`from_pretrained`'s argument that puts each weight onto the accelerator when it is read and cast."""
    return None if device is None or device.type == "cpu" else {"": device}


def load_transformer(
    model: Model, settings: ModelSettings, dtype: torch.dtype, device: torch.device | None = None
) -> torch.nn.Module:
    """The transformer, quantized if the settings say so.

    Args:
        device: the accelerator, onto which it is loaded piece by piece: a float32 checkpoint is then never in host
            memory as a whole. Without one, it stays on the CPU.

    Raises:
        InputError: a weight is missing, has another shape, or belongs to another model.
    """
    quantization = transformer_quantization(settings, load_skeleton(model, settings), dtype)
    with reporting_load_errors(settings):
        with limited_size():
            transformer, info = model.transformer_class.from_pretrained(
                settings.pretrained_model_name_or_path,
                subfolder="transformer",
                dtype=dtype,
                variant=settings.variant,
                use_safetensors=True,
                device_map=device_map(device),
                quantization_config=quantization,
                output_loading_info=True,
                **hub_options(settings),
            )
        check_loaded("transformer", info)
    if QUANTIZATION_PACKAGES.get(settings.quantize) == "torchao":
        forget_dequantized_weights(transformer)
    log_host_memory()
    return transformer
