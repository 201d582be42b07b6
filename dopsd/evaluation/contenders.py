"""Which LoRAs are compared: their files, whether they fit the base model, at which strengths they are drawn."""

import hashlib
import re
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from accelerate.logging import get_logger
from diffusers import DiffusionPipeline

from ..errors import InputError, naming_flag
from ..init_lora import convert, find_lora
from ..loading import brief, reporting_library_errors
from ..lora_roles import LORA_PREFIX
from ..output import LORA_FILE
from .comparison import BASE, ROLES, Contender, LoRA, Role
from .deployment import Deployment
from .settings import EvaluationSettings


logger = get_logger(__name__)

# At other strengths, and for two LoRAs together.
FEWER_ROLES: tuple[Role, ...] = ("concept", "unrelated")
_PART = re.compile(r"\.(lora|lokr)_")


def find_loras(settings: EvaluationSettings) -> tuple[list[LoRA], LoRA | None]:
    """The LoRAs of `--lora` and that of `--together_with`, with names that differ.

    Raises:
        InputError: there is no such LoRA, or nothing that it could be drawn together with.
    """
    taken = {BASE}
    loras = [find_one("--lora", argument, settings.cache_dir, taken) for argument in settings.lora]
    if settings.together_with is None:
        return loras, None
    together = find_one("--together_with", settings.together_with, settings.cache_dir, taken)
    if all(lora.digest == together.digest for lora in loras):
        raise InputError(
            f"--together_with {settings.together_with}: is the LoRA of --lora itself; give another, or drop the flag"
        )
    return loras, next((lora for lora in loras if lora.digest == together.digest), together)


def find_one(flag: str, argument: str, cache_dir: str | None, taken: set[str]) -> LoRA:
    """The LoRA that a flag's value means, NAME=PLACE or PLACE. Its name is added to `taken`."""
    name, place = split_name(argument)
    with (
        naming_flag(f"{flag} {place}:"),
        reporting_library_errors("no LoRA is found there", "give a .safetensors file, its folder or a hub id"),
    ):
        path = Path(place, LORA_FILE)
        if not path.is_file():
            path = find_lora(place, cache_dir)
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    name = unused_among(taken, name or default_name(place))
    taken.add(name)
    return LoRA(name, path, digest)


def split_name(argument: str) -> tuple[str | None, str]:
    """(name, place) of NAME=PLACE, or (None, place)."""
    name, sign, place = argument.partition("=")
    is_named = sign and name.strip() and "/" not in name and not Path(argument).exists()
    return (name.strip(), place) if is_named else (None, argument)


def default_name(place: str) -> str:
    """The file's name without its ending, or the folder's or repository's if all LoRAs are called like the file."""
    path = Path(place)
    if path.suffix == ".safetensors":
        path = path.with_suffix("")
        if path.name != Path(LORA_FILE).stem:
            return path.name
        path = path.absolute().parent
    return path.name or path.absolute().name


def unused_among(taken: set[str], name: str) -> str:
    number, unused = 1, name
    while unused in taken:
        number += 1
        unused = f"{name}-{number}"
    return unused


# Whether they fit


def check_loras(
    loras: Iterable[LoRA], deployment: Deployment, skeleton: torch.nn.Module, flag: str = "--lora"
) -> None:
    """Loads each LoRA into the transformer on the meta device, as the stock pipeline would.

    Args:
        skeleton: the transformer on the meta device.
        flag: that names the LoRAs.

    Raises:
        InputError: one is damaged, is not a LoRA, or belongs to another model.
    """
    modules = {name for name, _ in skeleton.named_modules()}
    for lora in loras:
        advice = f"give a LoRA of this {deployment.name}"
        with naming_flag(f"{flag} {lora.path}:"):
            with reporting_library_errors("its file is damaged", "download it again"):
                raw = safetensors.torch.load_file(lora.path)
            with reporting_library_errors("it is not a LoRA that diffusers can read", advice):
                if not any(_PART.search(f".{name}") for name in raw):
                    raise ValueError(f"it holds {len(raw)} tensors such as {brief(min(raw, default='none'), 80)}")
                weights, metadata = convert(deployment.pipeline_class, lora.path, raw)
            if "dora_scale" in "".join(raw):
                logger.warning(f"{lora.name}: stock diffusers leaves out the magnitudes of this DoRA (dora_scale)")
            if any(not name.startswith(LORA_PREFIX) for name in weights):
                logger.warning(f"{lora.name}: stock diffusers leaves out what it changes beside the transformer")
            with reporting_library_errors("it belongs to another model", advice):
                check_modules(weights, modules)
                check_finite(weights)
                weights = {name: weight.to("meta") for name, weight in weights.items()}
                load_into(deployment, skeleton, lora.name, weights, metadata)
                skeleton.delete_adapters(adapter_name(lora.name))


def check_modules(weights: dict[str, torch.Tensor], modules: set[str]) -> None:
    """Raises ValueError if the weights change nothing in the transformer, or something that it does not have."""
    own = [name.removeprefix(LORA_PREFIX) for name in sorted(weights) if name.startswith(LORA_PREFIX)]
    if not own:
        raise ValueError("it changes nothing in the transformer")
    for name in own:
        module = _PART.split(name)[0]
        if module not in modules:
            raise ValueError(f"it changes {brief(module, 100)}, which this transformer does not have")


def check_finite(weights: dict[str, torch.Tensor]) -> None:
    bad = next((name for name, weight in sorted(weights.items()) if not weight.isfinite().all()), None)
    if bad is not None:
        raise ValueError(f"its {brief(bad, 80)} is not finite")


def read_weights(deployment: Deployment, lora: LoRA) -> tuple[dict[str, torch.Tensor], dict | None]:
    """Weights and metadata of a LoRA that `check_loras` has accepted."""
    return convert(deployment.pipeline_class, lora.path, safetensors.torch.load_file(lora.path))


def load_into(
    deployment: Deployment,
    transformer: torch.nn.Module,
    name: str,
    weights: dict[str, torch.Tensor],
    metadata: dict[str, Any] | None,
    pipeline: DiffusionPipeline | None = None,
) -> None:
    """Adds the LoRA to the transformer as an adapter, by what the stock pipeline's `load_lora_weights` calls.

    Args:
        pipeline: that the transformer belongs to, whose parts may be offloaded.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config` attribute")  # a second LoRA
        deployment.pipeline_class.load_lora_into_transformer(
            weights, transformer=transformer, adapter_name=adapter_name(name), metadata=metadata, _pipeline=pipeline
        )


def adapter_name(name: str) -> str:
    """A name that torch accepts for a module: without dots."""
    return f"lora_{name.encode().hex()}"


# Who is drawn


def all_contenders(
    loras: list[LoRA], together: LoRA | None, strengths: list[float]
) -> dict[Contender, tuple[Role, ...]]:
    """Contender -> the roles of the prompts that it draws, in the order of the tables."""
    roles = {Contender(): ROLES} | {Contender((lora,)): ROLES for lora in loras}
    pairs = [] if together is None else [lora for lora in loras if lora != together]
    if together is not None:
        roles.setdefault(Contender((together,)), FEWER_ROLES)
    roles |= {Contender((lora,), strength): FEWER_ROLES for lora in loras for strength in strengths if strength != 1.0}
    return roles | {Contender((lora, together)): FEWER_ROLES for lora in pairs}
