"""What a run leaves: a LoRA file, or a pipeline with the trained transformer."""

import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import safetensors
import torch
from accelerate import PartialState
from accelerate.logging import get_logger
from diffusers import DiffusionPipeline
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from .errors import first_line
from .extraction import ExtractedLoRA, extract_lora
from .loading import PICKLED
from .lora_roles import StudentTeacherLoRA, warn_of_unportable
from .model import Model
from .model_card import model_loader
from .output import (
    LORA_FILE,
    MODEL_INDEX,
    TRANSFORMER_DIR,
    LoRAOfChange,
    pipeline_parts,
    remove,
    replace_folder,
    replacing,
    sync_to_disk,
    unfinished,
)
from .pretrained import load_skeleton, open_weights
from .roles import Roles
from .settings import Settings
from .weight_roles import StudentTeacherWeights


logger = get_logger(__name__)


class Product(ABC):
    """What a run saves of its student, in each checkpoint and at the end.

    Attributes:
        noun: what it is, for messages.
        name: of its file or folder in the output folder.
        dtype: in which it is saved.
        is_collective: whether all processes must call `collect`, since each may hold a part of the weights.
        restart: what to do after a step that diverged.
    """

    noun: str
    name: str
    dtype: torch.dtype
    is_collective: bool
    restart: str

    @abstractmethod
    def collect(self, roles: Roles, *, keep: bool, is_end: bool) -> Any:
        """The student's weights on the CPU, for `write`.

        Args:
            keep: whether this process writes them.
            is_end: whether they are for `finish` too.
        """

    @abstractmethod
    def write(self, weights: Any, folder: Path) -> None:
        """Writes the weights into a folder, completely or not at all."""

    def finish(self, weights: Any, folder: Path) -> None:
        """Writes all that the run leaves. Raises what `write` raises; all else that fails is an error in the log."""
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
    restart = (
        "start in another --output_dir with a lower --learning_rate (a checkpoint's folder can be --init_lora), or "
        "without fp16"
    )

    def __init__(self, pipeline_class: type[DiffusionPipeline], dtype: torch.dtype):
        self.pipeline_class, self.dtype = pipeline_class, dtype

    def collect(self, roles: StudentTeacherLoRA, *, keep: bool, is_end: bool) -> tuple[dict[str, torch.Tensor], dict]:
        return roles.export(self.dtype)

    def write(self, weights: tuple[dict[str, torch.Tensor], dict], folder: Path) -> None:
        save_lora(self.pipeline_class, *weights, folder)

    def loading_line(self, folder: Path) -> str:
        return f"The LoRA is {folder / LORA_FILE}; load it: pipe.load_lora_weights({str(folder)!r})"


def save_lora(
    pipeline_class: type[DiffusionPipeline],
    weights: dict[str, torch.Tensor],
    metadata: dict,
    folder: Path,
    header: dict[str, str] | None = None,
) -> None:
    """Writes `LORA_FILE` as stock diffusers reads it.

    Args:
        header: what else its header says. Loaders ignore it.
    """
    with replacing(folder / LORA_FILE) as temporary:
        pipeline_class.save_lora_weights(
            folder,
            transformer_lora_layers=weights,
            transformer_lora_adapter_metadata=metadata,
            weight_name=temporary.name,
        )
        if header:
            with safetensors.safe_open(temporary, "pt") as opened:
                header = opened.metadata() | header
            save_file(load_file(temporary), temporary, metadata=header)


class PipelineFolder(Product):
    """The student's transformer and, at the end, the rest of the pipeline around it.

    Args:
        model, settings: of the run.
        source: folder of the checkpoint that was trained, whose other parts are linked or copied.
        dtype: of the transformer in training.

    Attributes:
        part_names: the pipeline's folders besides the transformer's.
    """

    noun, name, is_collective = "model", TRANSFORMER_DIR, True
    restart = "start in another --output_dir with a lower --learning_rate"

    def __init__(self, model: Model, settings: Settings, source: Path, dtype: torch.dtype):
        self.model, self.settings, self.source, self.trained_dtype = model, settings, source, dtype
        self.dtype = torch.float32 if settings.lora.upcast_before_saving else dtype
        self.has_parts, self.rank = not settings.full.save_transformer_only, settings.full.extract_lora
        self.part_names = [name for name in pipeline_parts(source) if name != TRANSFORMER_DIR]

    def collect(self, roles: StudentTeacherWeights, *, keep: bool, is_end: bool) -> dict[str, torch.Tensor]:
        # A LoRA is extracted from the master weights: rounded ones hide small changes.
        extracts = is_end and self.rank is not None
        return roles.whole_state_dict(torch.float32 if extracts else self.dtype, keep=keep)

    def write(self, weights: dict[str, torch.Tensor], folder: Path, outdated: Sequence[str] = ()) -> None:
        """
        Args:
            outdated: files that are removed just before an earlier transformer is replaced.
        """
        target, temporary = folder / TRANSFORMER_DIR, unfinished(folder / TRANSFORMER_DIR)
        remove(temporary)
        try:
            self.save_transformer(weights, temporary)
            for name in outdated:
                (folder / name).unlink(missing_ok=True)
            sync_to_disk(folder)
            replace_folder(temporary, target)
        finally:
            remove(temporary)

    def save_transformer(self, weights: dict[str, torch.Tensor], folder: Path) -> None:
        """As `save_pretrained` of the transformer's class: in shards with an index, if it is large."""
        transformer = load_skeleton(self.model, self.settings.model)
        cast = {
            name: weight.to(self.dtype) if weight.is_floating_point() else weight for name, weight in weights.items()
        }
        transformer.load_state_dict(cast, assign=True)
        transformer.save_pretrained(folder, variant=self.settings.model.variant)
        for path in (*folder.iterdir(), folder):
            sync_to_disk(path)

    def finish(self, weights: dict[str, torch.Tensor], folder: Path) -> None:
        # An earlier end of this run, which has been resumed: what follows from its weights must not outlive them.
        self.write(weights, folder, outdated=(MODEL_INDEX, LORA_FILE))
        if self.has_parts:
            self.add_parts(folder)
        if self.rank is not None:
            self.add_lora(weights, folder)

    def add_parts(self, folder: Path) -> None:
        """Makes a pipeline of the folder. Without `MODEL_INDEX`, which comes last, it is none."""
        try:
            for name in self.part_names:
                link_or_copy(self.source / name, folder / name)
            with replacing(folder / MODEL_INDEX) as temporary:
                shutil.copyfile(self.source / MODEL_INDEX, temporary)
        except OSError as error:
            logger.error(
                f"--output_dir {folder}: the transformer is saved, but not the pipeline's other parts "
                f"({first_line(error)}); copy {', '.join(self.part_names)} and {MODEL_INDEX} from {self.source}"
            )

    def add_lora(self, weights: dict[str, torch.Tensor], folder: Path) -> None:
        """Extracts a LoRA from the change (`--extract_lora`)."""
        try:
            with open_weights(self.source / TRANSFORMER_DIR, self.settings.model.variant) as read:
                lora = extract_lora(
                    load_skeleton(self.model, self.settings.model),
                    weights,
                    # Training began from the rounded ones.
                    lambda name: read(name).to(self.trained_dtype),
                    rank=self.rank,
                    device=PartialState().device,
                )
            header = LoRAOfChange(lora.rank, lora.share).header
            save_lora(self.model.stock_pipeline_class, *lora.export(self.dtype), folder, header)
        except (OSError, SafetensorError, RuntimeError, MemoryError, ValueError) as error:
            logger.error(f"--extract_lora {self.rank}: no LoRA is saved ({first_line(error)}); the model is saved")
            return
        warn_of_unportable("--extract_lora", lora.modules, self.model.portable_lora_layers)
        logger.info(f"{describe(lora)}; it is {folder / LORA_FILE}")

    def loading_line(self, folder: Path) -> str:
        what, pipeline = f"The transformer is {folder / TRANSFORMER_DIR}", None
        if (folder / MODEL_INDEX).is_file():
            what, pipeline = f"The model is {folder}", self.model.card.pipeline
        return f"{what}; load it: {model_loader(str(folder), pipeline, self.settings.model.variant)}"


def describe(lora: ExtractedLoRA) -> str:
    count = f"{len(lora.modules)} {'module' if len(lora.modules) == 1 else 'modules'}"
    outside = ""
    if lora.share_outside >= 0.0005:
        outside = f"; {lora.share_outside:.1%} is in weights of other kinds, which no LoRA changes"
    return f"A LoRA of rank {lora.rank} for {count} holds {lora.share:.1%} of the change{outside}"


def link_or_copy(source: Path, target: Path) -> None:
    """Puts a component's files into another folder.

    Weights become hard links, where the file system can; small files, which people edit, are copied, so that the
    source stays as it is. Pickled weights are left out, since nothing here loads them.
    """
    for path in sorted(source.rglob("[!.]*")):
        if path.is_file() and path.suffix not in PICKLED:
            place = target / path.relative_to(source)
            place.parent.mkdir(parents=True, exist_ok=True)
            with replacing(place) as temporary:
                link_or_copy_file(path.resolve(), temporary)  # the hub's cache holds symbolic links


def link_or_copy_file(source: Path, target: Path) -> None:
    if source.suffix == ".safetensors":
        try:
            return os.link(source, target)
        except OSError:  # another file system, or one without links
            pass
    shutil.copyfile(source, target)
