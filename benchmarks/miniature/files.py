"""Paths of the miniature, and files that are either written completely or not at all."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file

from dopsd.errors import InputError


REPOSITORY = Path(__file__).resolve().parents[2]
MODEL = Path(__file__).resolve().parent / "model"  # the shipped miniature FLUX.2-klein
ZIMAGE_MODEL = Path(__file__).resolve().parent / "zimage"  # the shipped miniature Z-Image-Turbo
TRANSFORMER_WEIGHTS = Path("transformer", "diffusion_pytorch_model.safetensors")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a path next to `path` to write to, and renames it to `path` afterwards.

    If the process stops in between, `path` still has its previous content.
    """
    partial = path.with_name(f"{path.stem}.partial{path.suffix}")
    yield partial
    partial.replace(path)


def write_pipeline(model: Path, folder: Path, weights: dict[str, torch.Tensor]) -> Path:
    """Writes a whole pipeline: the model in a folder with these weights of its transformer. Returns `folder`."""
    shutil.copytree(model, folder, dirs_exist_ok=True)
    with replacing(folder / TRANSFORMER_WEIGHTS) as partial:
        save_file(weights, partial, metadata={"format": "pt"})
    return folder


def make_folder(folder: Path, *, flag: str) -> None:
    """Creates the folder and its parents.

    Raises:
        InputError: the folder cannot be created. The message names the flag.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{flag} {folder}: {error.strerror}; choose another folder") from error


def check_model(folder: Path) -> None:
    """Raises `InputError` unless the folder given as `--model` holds a pipeline."""
    if not (folder / "model_index.json").exists():
        raise InputError(
            f"--model {folder}: holds no pipeline; give a folder that `python -m benchmarks.miniature.make` wrote"
        )


def check_settings(folder: Path, settings: dict, *, flag: str) -> None:
    """Records in settings.json what the folder's content depends on, or compares it with what is recorded there.

    Raises:
        InputError: the content was made with different settings. The message names the flag.
    """
    path = folder / "settings.json"
    if not path.exists():
        path.write_text(json.dumps(settings, indent=2) + "\n")
    recorded = json.loads(path.read_text())
    for name, value in settings.items():
        if recorded.get(name) != value:
            raise InputError(
                f"{flag} {folder}: its content was made with another {name} ({recorded.get(name)}, now {value}); "
                "choose a new folder"
            )
