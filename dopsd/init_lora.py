"""Reading an existing LoRA to start from (`--init_lora`): which file, what kind it is, whether it fits."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from accelerate.logging import get_logger
from diffusers import DiffusionPipeline
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from huggingface_hub import HfApi, hf_hub_download, snapshot_download

from .errors import InputError, naming_flag
from .loading import PICKLED, brief, reporting_library_errors
from .lora_roles import LORA_PREFIX, StudentTeacherLoRA
from .model import Model
from .output import ADAPTERS_FILE


logger = get_logger(__name__)

# What other adapters than a plain LoRA have in their tensors' names.
OTHER_KINDS = {
    r"\.lokr_": "a LoKr",
    r"\.hada_": "a LoHa",
    r"dora_scale|lora_magnitude_vector": "a DoRA",
    r"\.b?oft_": "an OFT",
    r"\.(ia3_l|lora_vera|vera_lambda)": "an IA3 or VeRA",
    r"\.lora_mid\b": "a LoCon with a Tucker decomposition",
}
PEFT_PREFIX = "base_model.model."
# diffusers, too, takes files with these words for something else than a LoRA.
OTHER_FILES = re.compile("scheduler|optimizer|checkpoint")


def read_init_lora(
    model: Model,
    name_or_path: str | None,
    skeleton: torch.nn.Module,
    lora_options: dict[str, Any],
    cache_dir: str | None = None,
) -> tuple[dict[str, torch.Tensor], dict | None] | None:
    """Weights and metadata of `--init_lora`, as diffusers reads them; None without the flag.

    Args:
        skeleton: the transformer on the meta device. It gets adapters.
        lora_options: of the LoRA that will be trained, for `StudentTeacherLoRA`.
        cache_dir: folder of the hub cache, or None for the default one.

    Raises:
        InputError: there is no LoRA, or it does not fit the one that will be trained.
    """
    if name_or_path is None:
        return None
    flag = f"--init_lora {name_or_path}"
    with (
        naming_flag(f"{flag}:"),
        reporting_library_errors("no LoRA is found there", "give a .safetensors file, its folder or a hub id"),
    ):
        path = find_lora(name_or_path, cache_dir)
        raw = safetensors.torch.load_file(path)
    if problem := kind_problem(raw):
        raise InputError(f"{flag}: {problem}")
    linear = {
        name: (module.out_features, module.in_features)
        for name, module in skeleton.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    advice = f"give a plain LoRA of this size of {model.name}"
    with reporting_library_errors(f"{flag}: it belongs to another model, or diffusers cannot read its format", advice):
        weights, metadata = convert(model.stock_pipeline_class, path, raw)
        if problem := shape_problem(weights, linear):
            raise InputError(f"{flag}: {problem}; {advice}")
        # The same as after the encodings, on the meta device.
        roles = StudentTeacherLoRA(skeleton, **lora_options, teacher="base")
        roles.load_lora(weights, metadata, origin=name_or_path)
    return weights, metadata


def start_from_lora(
    roles: StudentTeacherLoRA, lora: tuple[dict[str, torch.Tensor], dict | None] | None, origin: str | None
) -> None:
    """Starts student and teacher from what `read_init_lora` returned.

    Args:
        origin: the value of `--init_lora`.
    """
    if lora is not None:
        num_new = roles.load_lora(*lora, origin=origin)
        if num_new > 0:
            logger.warning(f"--init_lora: {num_new} of the trained modules are not in it and start at zero")


# Which file


def find_lora(name_or_path: str, cache_dir: str | None) -> Path:
    """The LoRA's file, downloaded if necessary.

    Raises:
        InputError: there are several, or only pickled ones. The message continues the name of the flag.
        OSError, ValueError: there is none.
    """
    path = Path(name_or_path)
    if path.is_dir():
        return path / _choose(entry.name for entry in path.iterdir() if entry.is_file())
    if path.suffix in PICKLED and path.is_file():
        raise InputError("it is a pickled file, which could run code; convert it to safetensors")
    if path.is_file():
        return path
    if path.exists():
        raise InputError("it is a pipe or a device; give a .safetensors file, its folder or a hub id")
    if path.is_absolute() or path.suffix == ".safetensors":
        raise FileNotFoundError("there is no such file or folder")
    try:
        names = HfApi().list_repo_files(name_or_path)
    except OSError:
        # Without a connection, what was downloaded before.
        folder = Path(snapshot_download(name_or_path, cache_dir=cache_dir, local_files_only=True))
        return find_lora(str(folder), None)
    top = [name for name in names if "/" not in name]
    chosen = LORA_WEIGHT_NAME_SAFE if LORA_WEIGHT_NAME_SAFE in top else _choose(top)
    return Path(hf_hub_download(name_or_path, chosen, cache_dir=cache_dir))


def _choose(names: Iterable[str]) -> str:
    """The only LoRA among the files of a folder."""
    names = sorted(names)
    found = [name for name in names if name.endswith(".safetensors") and not OTHER_FILES.search(name)]
    found = [name for name in found if name != ADAPTERS_FILE]  # in a checkpoint of a run, beside its LoRA
    if len(found) > 1:
        raise InputError(f"it holds {len(found)} LoRAs ({brief(', '.join(found), 200)}); name one of the files")
    if found:
        return found[0]
    if pickled := [name for name in names if name.endswith(PICKLED)]:
        raise InputError(
            f"it holds only {brief(pickled[0], 80)}, a pickled file, which could run code; convert it to safetensors"
        )
    raise FileNotFoundError("there is no .safetensors file")


# What it is


def kind_problem(raw: dict[str, torch.Tensor]) -> str | None:
    """What keeps a file with these tensors from being a plain LoRA; None if it looks like one."""
    if not raw:
        return "it holds no tensors; give another file"
    if all(name.startswith(("student.", "teacher.")) for name in raw):
        return "it is a checkpoint's file; resume with --resume_from_checkpoint, or give the LoRA of a finished run"
    for expression, kind in OTHER_KINDS.items():
        if any(re.search(expression, name) for name in raw):
            return f"it is {kind}, from which a LoRA cannot start; give a plain LoRA"
    if not any("lora" in name for name in raw):
        return f"it is not a LoRA: it holds {len(raw)} tensors such as {brief(min(raw), 80)}; give a LoRA's file"
    if bad := next((name for name, weight in sorted(raw.items()) if not weight.isfinite().all()), None):
        return f"its {brief(bad, 80)} is not finite; give another file"
    return None


def convert(
    pipeline_class: type[DiffusionPipeline], path: Path, raw: dict[str, torch.Tensor]
) -> tuple[dict[str, torch.Tensor], dict | None]:
    """Weights with the transformer's own names, and metadata, as the stock pipeline reads them.

    Args:
        path: the LoRA's file.
        raw: its tensors.
    """
    read = pipeline_class.lora_state_dict
    left = dict(raw)
    if any(name.startswith(PEFT_PREFIX) for name in raw):
        # The stock pipelines know this prefix by another name, but not all of them by this one.
        renamed = {name.replace(PEFT_PREFIX, "diffusion_model.", 1): weight for name, weight in raw.items()}
        return read(renamed), None
    read(left)
    if 0 < len(left) < len(raw):  # The converter takes what it knows out of the dict, and drops the rest silently.
        raise ValueError(f"unknown {brief(min(left), 80)}")
    weights, metadata = read(str(path), use_safetensors=True, return_lora_metadata=True)
    if not any(name.startswith(LORA_PREFIX) for name in weights):  # saved from a transformer, not from a pipeline
        weights = {LORA_PREFIX + name: weight for name, weight in weights.items()}
        metadata = metadata and {LORA_PREFIX + name: value for name, value in metadata.items()}
    return weights, metadata


def shape_problem(weights: dict[str, torch.Tensor], linear: dict[str, tuple[int, int]]) -> str | None:
    """Why no choice of flags lets these weights be the start; None if there is one.

    Args:
        weights: `transformer.<module>.lora_A.weight` (rank, in) and `lora_B.weight` (out, rank).
        linear: (out, in) of the transformer's linear modules.
    """
    ranks, matrices = set(), {}
    for key, weight in sorted(weights.items()):
        module, found, matrix = key.removeprefix(LORA_PREFIX).rpartition(".lora_")
        name = brief(module, 100)
        if key.startswith("text_encoder"):
            return "it also changes the text encoder, which is not trained"
        if not found or matrix not in ("A.weight", "B.weight") or weight.ndim != 2:
            return f"it holds {brief(key, 100)}, which is no part of a plain LoRA of linear modules"
        if module not in linear:
            return f"it changes {name}, which is no linear module of this transformer"
        rank, channels = weight.shape if matrix == "A.weight" else weight.shape[::-1]
        expected = linear[module][1 if matrix == "A.weight" else 0]
        if channels != expected:
            return f"its lora_{matrix[0]} of {name} has {channels} channels, but the module has {expected}"
        ranks.add(rank)
        matrices.setdefault(module, set()).add(matrix)
    if not matrices:
        return "it changes nothing in the transformer"
    if half := next((module for module, found in matrices.items() if len(found) < 2), None):
        return f"it holds only one of the two matrices of {brief(half, 100)}"
    if len(ranks) > 1:
        return f"its modules have {len(ranks)} different ranks, from {min(ranks)} to {max(ranks)}; training has one"
    return None
