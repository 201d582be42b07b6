"""What a run leaves: a LoRA file, or a pipeline with the trained transformer."""

import os
import shutil
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from .loading import read_config
from .lora_roles import StudentTeacherLoRA
from .model import Model
from .output import LORA_FILE, MODEL_INDEX, TRANSFORMER_DIR, remove, replacing, sync_to_disk
from .pretrained import load_skeleton
from .roles import Roles
from .settings import Settings
from .weight_roles import StudentTeacherWeights


class Product(ABC):
    """What a run saves of its student, in each checkpoint and at the end.

    Attributes:
        noun: what it is, for messages.
        name: of its file or folder in the output folder.
        dtype: in which it is saved.
        is_collective: whether all processes must call `collect`, since each may hold a part of the weights.
    """

    noun: str
    name: str
    dtype: torch.dtype
    is_collective: bool

    @abstractmethod
    def collect(self, roles: Roles, *, keep: bool) -> Any:
        """The student's weights on the CPU, for `write`.

        Args:
            keep: whether this process writes them.
        """

    @abstractmethod
    def write(self, weights: Any, folder: Path) -> None:
        """Writes the weights into a folder, completely or not at all."""

    def finish(self, weights: Any, folder: Path) -> None:
        """Writes all that the run leaves."""
        self.write(weights, folder)

    @abstractmethod
    def loading_line(self, folder: Path) -> str:
        """Says what is where, and how it is loaded."""


class LoRAFile(Product):
    """The student's adapter, as stock diffusers reads it.

    Args:
        pipeline_class: the stock pipeline.
        dtype: of the file.
    """

    noun, name, is_collective = "LoRA", LORA_FILE, False

    def __init__(self, pipeline_class: type[DiffusionPipeline], dtype: torch.dtype):
        self.pipeline_class, self.dtype = pipeline_class, dtype

    def collect(self, roles: StudentTeacherLoRA, *, keep: bool) -> tuple[dict[str, torch.Tensor], dict]:
        return roles.export(self.dtype)

    def write(self, weights: tuple[dict[str, torch.Tensor], dict], folder: Path) -> None:
        save_lora(self.pipeline_class, *weights, folder)

    def loading_line(self, folder: Path) -> str:
        return f"The LoRA is {folder / LORA_FILE}; load it: pipe.load_lora_weights({str(folder)!r})"


def save_lora(
    pipeline_class: type[DiffusionPipeline], weights: dict[str, torch.Tensor], metadata: dict, folder: Path
) -> None:
    """Writes `LORA_FILE` as stock diffusers reads it."""
    with replacing(folder / LORA_FILE) as unfinished:
        pipeline_class.save_lora_weights(
            folder,
            transformer_lora_layers=weights,
            transformer_lora_adapter_metadata=metadata,
            weight_name=unfinished.name,
        )


class PipelineFolder(Product):
    """The student's transformer and, at the end, the rest of the pipeline around it.

    Args:
        model, settings: of the run.
        source: folder of the checkpoint that was trained, whose other parts are linked or copied.
        dtype: of the saved transformer.
    """

    noun, name, is_collective = "model", TRANSFORMER_DIR, True

    def __init__(self, model: Model, settings: Settings, source: Path, dtype: torch.dtype):
        self.model, self.settings, self.source, self.dtype = model, settings, source, dtype
        self.has_parts = not settings.full.save_transformer_only

    def collect(self, roles: StudentTeacherWeights, *, keep: bool) -> dict[str, torch.Tensor]:
        return roles.whole_state_dict(self.dtype, keep=keep)

    def write(self, weights: dict[str, torch.Tensor], folder: Path) -> None:
        unfinished = folder / f".{TRANSFORMER_DIR}.tmp"
        remove(unfinished)
        try:
            self.save_transformer(weights, unfinished)
            replace_folder(unfinished, folder / TRANSFORMER_DIR)
        finally:
            remove(unfinished)

    def save_transformer(self, weights: dict[str, torch.Tensor], folder: Path) -> None:
        """As `save_pretrained` of the transformer's class."""
        transformer = load_skeleton(self.model, self.settings.model)
        transformer.load_state_dict(weights, assign=True)
        transformer.save_pretrained(folder, variant=self.settings.model.variant)
        for path in (*folder.iterdir(), folder):
            sync_to_disk(path)

    def finish(self, weights: dict[str, torch.Tensor], folder: Path) -> None:
        self.write(weights, folder)
        if self.has_parts:
            for name in self.part_names:
                link_or_copy(self.source / name, folder / name)
            # Last: without it, the folder is no pipeline.
            with replacing(folder / MODEL_INDEX) as unfinished:
                shutil.copyfile(self.source / MODEL_INDEX, unfinished)

    @property
    def part_names(self) -> list[str]:
        """The pipeline's folders besides the transformer's."""
        return [
            name
            for name in read_config(self.source / MODEL_INDEX)
            if name != TRANSFORMER_DIR and (self.source / name).is_dir()
        ]

    def loading_line(self, folder: Path) -> str:
        if self.has_parts:
            return f"The model is {folder}; load it: {self.model.card.pipeline}.from_pretrained({str(folder)!r})"
        loader = f"{self.model.transformer_class.__name__}.from_pretrained({str(folder)!r}, subfolder='transformer')"
        return f"The transformer is {folder / TRANSFORMER_DIR}; load it: {loader}"


def replace_folder(new: Path, old: Path) -> None:
    """Puts a complete folder in the place of another one, or of none."""
    aside = old.with_name(f".{old.name}.old")
    remove(aside)
    if old.exists():
        old.rename(aside)
    new.rename(old)
    sync_to_disk(old.parent)
    remove(aside)


def link_or_copy(source: Path, target: Path) -> None:
    """Puts a folder's files into another one: as hard links, where the file system can, otherwise as copies."""
    for path in sorted(source.rglob("*")):
        if path.is_file():
            place = target / path.relative_to(source)
            place.parent.mkdir(parents=True, exist_ok=True)
            with replacing(place) as unfinished:
                real = path.resolve()  # the hub's cache holds symbolic links
                try:
                    os.link(real, unfinished)
                except OSError:
                    shutil.copyfile(real, unfinished)
