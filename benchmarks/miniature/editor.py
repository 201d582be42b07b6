"""The editor: a miniature that also edits pictures, shipped as the weights of its transformer."""

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from benchmarks.miniature.files import MODEL, replacing


WEIGHTS = Path(__file__).resolve().parent / "editor" / "transformer.safetensors"  # bfloat16
TRANSFORMER_WEIGHTS = Path("transformer", "diffusion_pytorch_model.safetensors")


def save_editor(transformer: torch.nn.Module, path: Path) -> None:
    """Writes the transformer's weights in bfloat16."""
    path.parent.mkdir(parents=True, exist_ok=True)
    weights = {name: weight.bfloat16().contiguous() for name, weight in transformer.state_dict().items()}
    with replacing(path) as partial:
        save_file(weights, partial)


def assemble_editor(folder: Path, weights: Path = WEIGHTS) -> Path:
    """Writes the editor as a whole pipeline in float32, with the miniature's other components. Returns the folder."""
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(MODEL, partial)
    save_file(
        {name: weight.float() for name, weight in load_file(weights).items()},
        partial / TRANSFORMER_WEIGHTS,
        metadata={"format": "pt"},
    )
    shutil.rmtree(folder, ignore_errors=True)
    partial.replace(folder)
    return folder
