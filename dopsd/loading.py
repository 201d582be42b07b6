"""Checks around the libraries' loaders, which accept incomplete checkpoints silently and fail in many ways."""

import importlib
import inspect
import json
import logging
import math
import re
import types
import typing
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import diffusers.utils as diffusers_files
import safetensors
import torch
import transformers.utils as transformers_files
from huggingface_hub.errors import StrictDataclassError
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from .errors import InputError, device_errors, one_line
from .settings import ModelSettings


# What the libraries raise for files that are missing, damaged, or valid with wrong values, as found by damaging some.
# Some RuntimeErrors are failures of a device, and no fault of a file: see `reporting_load_errors`.
LOAD_ERRORS = (
    OSError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    AssertionError,
    ImportError,
    MemoryError,
    RuntimeError,
    EOFError,
    UnpicklingError,
    StrictDataclassError,
    safetensors.SafetensorError,
)
PICKLED = (".bin", ".pt", ".pth", ".ckpt")  # endings of weight files that could run code

_DEVICE_MESSAGE = re.compile(r"CUDA|CUBLAS|CUDNN|NCCL|HIP error|out of memory")

# The largest models here have some hundred parameter tensors; a configuration with a billion layers has no end.
MAX_PARAMETERS = 5_000
MAX_LAYERS = 10_000
MAX_NUMBER = 10**12
_COUNT_NAME = re.compile(r"layers|depth|blocks|timesteps")

# The text encoder's hidden states do not depend on a language model's head, whether a checkpoint has one or lacks it,
# and the buffers of older versions are computed or unused now.
_HARMLESS_KEY = re.compile(r"(^|\.)(lm_head|score|rotary_emb\.inv_freq|position_ids|num_batches_tracked)(\.|$)")


def brief(text: object, limit: int = 180) -> str:
    """The message of an error, or any text, on one line and not longer than `limit`."""
    message = one_line(text) if isinstance(text, Exception) else " ".join(str(text).split())
    message = message or type(text).__name__
    return message if len(message) <= limit else message[: limit - 3] + "..."


def is_device_error(error: Exception) -> bool:
    """Whether a GPU failed or ran out of memory. Older versions of PyTorch raise a plain RuntimeError."""
    return isinstance(error, device_errors()) or (
        isinstance(error, RuntimeError) and _DEVICE_MESSAGE.search(str(error)) is not None
    )


@contextmanager
def quiet_diffusers() -> Iterator[None]:
    """Mutes diffusers, which logs errors that it raises too."""
    verbosity = diffusers_files.logging.get_verbosity()
    diffusers_files.logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        diffusers_files.logging.set_verbosity(verbosity)


@contextmanager
def reporting_library_errors(problem: str, advice: str) -> Iterator[None]:
    """Turns an error of the libraries' loaders into an `InputError`: "problem (their reason); advice".

    A device's errors pass. Keep the block to the loaders: it would hide a bug of this project.
    """
    try:
        with quiet_diffusers():
            yield
    except InputError:
        raise
    except LOAD_ERRORS as error:
        if is_device_error(error):
            raise
        raise InputError(f"{problem} ({brief(error)}); {advice}") from error


def reporting_load_errors(settings: ModelSettings) -> AbstractContextManager[None]:
    """Turns the error for a missing or damaged file of the checkpoint into an `InputError`."""
    return reporting_library_errors(
        f"--pretrained_model_name_or_path {settings.pretrained_model_name_or_path}: cannot be loaded",
        "check its files and --variant, --revision",
    )


@contextmanager
def limited_size() -> Iterator[None]:
    """Ends the building of a model that has no end, or nearly none, with a ValueError."""
    count = 0

    def hook(module: torch.nn.Module, name: str, parameter: torch.nn.Parameter | None) -> None:
        nonlocal count
        count += 1
        if count > MAX_PARAMETERS:
            raise ValueError(f"its configuration describes a model of more than {MAX_PARAMETERS:,} tensors")

    handle = register_module_parameter_registration_hook(hook)
    try:
        yield
    finally:
        handle.remove()


# Configurations


def read_config(path: Path) -> dict[str, Any]:
    """A JSON object. Raises ValueError or OSError."""
    config = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(config, dict):
        raise ValueError(f"{path.parent.name}/{path.name} is not a JSON object")
    return config


def check_config(config: dict[str, Any], name: str, diffusers_class: type | None = None) -> None:
    """Checks the values of a component's configuration, before something of their size is built.

    Args:
        name: of the component, for the message.
        diffusers_class: whose arguments are named in the configuration; their annotations tell the types.

    Raises:
        ValueError: a number is absurd, or a value has another type.
    """

    def refuse(key: str, value: Any) -> None:
        raise ValueError(f"{name}'s configuration sets {brief(key, 40)} to {brief(repr(value), 40)}")

    if not isinstance(config, dict):
        raise ValueError(f"{name}'s configuration is not a JSON object")
    for key, value in _numbers(config):
        limit = MAX_LAYERS if _COUNT_NAME.search(key) else MAX_NUMBER
        if not math.isfinite(value) or abs(value) > limit:
            refuse(key, value)
        if diffusers_class is not None and isinstance(value, int) and value < 0:
            refuse(key, value)
    if diffusers_class is not None:
        for key, parameter in inspect.signature(diffusers_class.__init__).parameters.items():
            default, kind = parameter.default, parameter.annotation
            if kind is parameter.empty:
                kind = Any if default in (None, parameter.empty) else type(default)
            if key in config and not _fits(config[key], kind) and (config[key] is not None or default is not None):
                refuse(key, config[key])


def _fits(value: Any, kind: Any) -> bool:
    """Whether a JSON value is one of an annotation's type. True for types that are not JSON's."""
    origin = typing.get_origin(kind) or kind
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, choice) for choice in typing.get_args(kind))
    if origin in (None, types.NoneType):
        return value is None
    if origin in (int, float):
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if origin in (list, tuple):
        return isinstance(value, list)
    return isinstance(value, origin) if origin in (bool, str, dict) else True


def _numbers(config: Any, key: str = "") -> Iterator[tuple[str, int | float]]:
    """Each number in a nested configuration, with the key that it belongs to."""
    if isinstance(config, (int, float)) and not isinstance(config, bool):
        yield key, config
    elif isinstance(config, dict):
        for name, value in config.items():
            yield from _numbers(value, name)
    elif isinstance(config, list):
        for value in config:
            yield from _numbers(value, key)


def check_text_config(config: PretrainedConfig) -> None:
    """Raises ValueError if the text encoder has no layers, channels or vocabulary."""
    for name in ("hidden_size", "num_hidden_layers", "vocab_size"):
        value = getattr(config, name, None)
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"text_encoder's configuration sets {name} to {brief(repr(value), 40)}")


# Weight files


def _weight_names(component: str, variant: str | None) -> tuple[str, str]:
    """Names of a component's single weight file and of the index of its shards."""
    if component == "text_encoder":
        names = transformers_files.SAFE_WEIGHTS_NAME, transformers_files.SAFE_WEIGHTS_INDEX_NAME
    else:
        names = diffusers_files.SAFETENSORS_WEIGHTS_NAME, diffusers_files.SAFE_WEIGHTS_INDEX_NAME
    if variant is None:
        return names
    return tuple(".".join([*name.split(".")[:-1], variant, name.split(".")[-1]]) for name in names)


def check_weight_files(folder: Path, component: str, variant: str | None) -> None:
    """Opens a component's safetensors files, without reading a tensor.

    The libraries say less about a damaged file, and read all of it to find that out.

    Args:
        folder: the checkpoint.

    Raises:
        ValueError: a file is missing or damaged, or the weights are pickled.
    """
    place = folder / component
    single, index = (place / name for name in _weight_names(component, variant))
    if not single.is_file() and not index.is_file():
        names = sorted(path.name for path in place.iterdir())
        if any(name.endswith(".safetensors") and variant is not None and f".{variant}" in name for name in names):
            return  # with an index whose name is an older form, which the library knows
        pickled = [name for name in names if name.endswith(PICKLED)]
        if pickled and not any(name.endswith(".safetensors") for name in names):
            raise ValueError(
                f"{component} has only {brief(pickled[0], 60)}, a pickled file, which could run code; convert it to "
                "safetensors"
            )
        raise ValueError(f"{component} has no {single.name}")
    paths = [single]
    if index.is_file() and not (component == "text_encoder" and single.is_file()):
        shard_of = read_config(index).get("weight_map")
        if not isinstance(shard_of, dict) or not all(isinstance(shard, str) for shard in shard_of.values()):
            raise ValueError(f"{component}/{index.name} has no weight_map with file names")
        paths = [place / shard for shard in sorted(set(shard_of.values()))]
    for path in paths:
        name = f"{component}/{brief(path.name, 80)}"
        if path.parent != place or not path.is_file():
            raise ValueError(f"{component}/{index.name} names {brief(path.name, 80)}, which is not there")
        try:
            with safetensors.safe_open(path, framework="pt"):
                pass
        except (OSError, safetensors.SafetensorError) as error:
            raise ValueError(f"{name} is damaged: {brief(error, 80)}; download it again") from error


def check_loaded(component: str, info: dict[str, Iterable]) -> None:
    """Raises ValueError if weights and configuration do not fit: the libraries fill gaps with random values.

    Args:
        info: from `from_pretrained(..., output_loading_info=True)`. The libraries have already removed tied tensors
            and those that a class lists as ignorable.
    """
    missing, unexpected = (
        sorted(key for key in info[kind] if not _HARMLESS_KEY.search(key))
        for kind in ("missing_keys", "unexpected_keys")
    )
    if missing:
        raise ValueError(
            f"{component} lacks {len(missing)} of the tensors that its configuration asks for, such as "
            f"{brief(missing[0], 80)}"
        )
    if unexpected:
        raise ValueError(
            f"{component} has {len(unexpected)} tensors that do not belong to its configuration, such as "
            f"{brief(unexpected[0], 80)}"
        )
    if mismatched := sorted(info["mismatched_keys"]):
        key, found, expected = mismatched[0]
        raise ValueError(
            f"{component}'s {brief(key, 80)} has shape {list(found)}, but {list(expected)} according to its "
            "configuration"
        )


# Tokenizers


def load_tokenizer(folder: Path, kind: tuple[str, str] | list[str]) -> PreTrainedTokenizerBase:
    """The tokenizer of the class that model_index.json names, without running code of the checkpoint.

    Raises:
        ValueError: there is none, or it is incomplete or damaged.
    """
    library, name = kind
    if library != "transformers":
        raise ValueError(f"its tokenizer is a {brief(name, 60)} of {brief(library, 60)}, not one of transformers")
    place, tokenizer_class = folder / "tokenizer", getattr(importlib.import_module("transformers"), name)
    _check_vocabulary(place, getattr(tokenizer_class, "vocab_files_names", {}))
    try:
        tokenizer = tokenizer_class.from_pretrained(place, trust_remote_code=False)
    except Exception as error:  # The tokenizers library raises nothing more specific.
        raise ValueError(f"tokenizer cannot be used: {brief(error)}") from error
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ValueError(f"its tokenizer is a {brief(name, 60)}, which is not a tokenizer")
    _check_vocabulary(place, tokenizer.vocab_files_names)  # An AutoTokenizer knows them only now.
    return tokenizer


def _check_vocabulary(place: Path, file_names: dict[str, str]) -> None:
    """Without its files, a tokenizer is empty; without its merges, it splits every word into letters."""
    names = {**file_names}
    whole = names.pop("tokenizer_file", None)
    missing = [name for name in names.values() if not (place / name).is_file()]
    if missing and (whole is None or not (place / whole).is_file()):
        raise ValueError(f"tokenizer lacks its vocabulary ({', '.join([*filter(None, [whole]), *missing])})")


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, text_config: PretrainedConfig) -> None:
    """Raises ValueError if the tokenizer loses text, cannot pad, or has tokens that the text encoder does not have."""
    sample = "a photo of a small dog"
    ids = tokenizer(sample).input_ids
    if tokenizer.decode(ids, skip_special_tokens=True).strip() != sample:
        raise ValueError("tokenizer cannot represent a simple text; its vocabulary is damaged")
    if tokenizer.pad_token is None:
        raise ValueError("tokenizer has no padding token")
    if len(tokenizer) > text_config.vocab_size:
        raise ValueError(
            f"tokenizer has {len(tokenizer)} tokens, but text_encoder's vocabulary only {text_config.vocab_size}"
        )
