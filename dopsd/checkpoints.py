"""Checkpoints and the LoRA file: saving, finding and loading them, and which settings a resumed run must keep."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from diffusers import DiffusionPipeline
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from .context_cache import content_key
from .data.training_data import TrainingData
from .encoders import VLM_FLAG
from .errors import DEVICE_ERRORS, InputError, OutputError, TrainingDiverged, first_line
from .model import Conditioning
from .output import LORA_FILE, checkpoint_step, list_checkpoints, reporting_write_errors, sync_to_disk
from .pretrained import model_identity
from .roles import StudentTeacherLoRA
from .settings import Settings, TrainingSettings


logger = get_logger(__name__)

PICTURES = "pictures and captions"


def resume_contract(
    settings: Settings, conditioning: Conditioning, data: TrainingData, num_processes: int
) -> dict[str, Any]:
    """Everything that a resumed run must share with its checkpoint to end with the same weights, in JSON types."""
    identities = {VLM_FLAG: ""}
    for encoder in conditioning.encoders:
        identities |= encoder.identity()
    values = settings.must_match() | identities
    values["model"] = model_identity(settings.model)
    values[PICTURES] = {
        picture.name: content_key(digest, picture.captions, picture.teacher_caption)[:16]
        for picture, digest in zip(data.pictures, data.digests, strict=True)
    }
    accumulation_steps = settings.training.gradient_accumulation_steps
    values["processes x --gradient_accumulation_steps"] = num_processes * accumulation_steps
    return json.loads(json.dumps(values))


# Finding


def find_checkpoint(settings: TrainingSettings) -> Path | None:
    """The checkpoint to resume from; None for a new run.

    Raises:
        InputError: it does not exist, or this run would overwrite another one's results or mix with them.
    """
    output_dir, wanted = Path(settings.output_dir), settings.resume_from_checkpoint
    existing = list_checkpoints(output_dir)
    names = ", ".join(path.name for path in existing) or "none"
    if wanted is None and existing:
        raise InputError(
            f"--output_dir {output_dir}: holds an earlier run ({names}); choose another folder, or continue it with "
            "--resume_from_checkpoint latest"
        )
    if wanted in (None, "latest"):
        if not existing:
            refuse_finished(output_dir)
        return existing[-1] if existing else None
    for path in (output_dir / wanted, Path(wanted)):
        if checkpoint_step(path) >= 0:
            if existing and checkpoint_step(existing[-1]) > checkpoint_step(path):
                raise InputError(
                    f"--resume_from_checkpoint {wanted}: {output_dir} holds newer checkpoints ({names}), which this "
                    "run would mix with; move them away, or resume from latest"
                )
            return path
    raise InputError(f"--resume_from_checkpoint {wanted}: no complete checkpoint; {output_dir} has: {names}")


def refuse_finished(output_dir: Path) -> None:
    if (output_dir / LORA_FILE).exists():
        raise InputError(
            f"--output_dir {output_dir}: holds a finished run's {LORA_FILE} and no checkpoint to continue from; "
            "choose another folder"
        )


def read_state(checkpoint: Path) -> dict:
    """The checkpoint's step, and the settings that it was trained with."""
    try:
        state = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
        return {"step": state["step"], "settings": state["settings"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"--resume_from_checkpoint {checkpoint}: state.json is damaged; remove the folder") from error


def check_resumable(checkpoint: Path, contract: dict[str, Any]) -> None:
    """Raises `InputError` if the run's contract differs from the checkpoint's."""
    for name, saved in read_state(checkpoint)["settings"].items():
        now = contract.get(name)
        if name == PICTURES and saved != now:
            changed = sorted(
                picture for picture in saved.keys() | now.keys() if saved.get(picture) != now.get(picture)
            )
            raise InputError(
                f"--resume_from_checkpoint {checkpoint.name}: {changed[0]} or its caption was added, changed or "
                f"removed (pictures affected: {len(changed)}); undo that, or start in another --output_dir"
            )
        if saved != now:
            raise InputError(
                f"--resume_from_checkpoint {checkpoint.name}: its {name} was {saved}, now it is {now}; pass the same, "
                "or start in another --output_dir"
            )


# Saving and loading


def save_state(state: dict[str, Any], path: Path) -> None:
    """`torch.save`, whose RuntimeError for a full disk becomes an OSError. Errors of the GPU stay what they are."""
    try:
        torch.save(state, path)
    except RuntimeError as error:
        if isinstance(error, DEVICE_ERRORS):
            raise
        raise OSError(first_line(error)) from error


class Checkpoints:
    """Saves and loads adapters, optimizer, scheduler and step; never the frozen base model.

    Args:
        training: names the output folder and the maximum number of checkpoints.
        accelerator: with its gradient scaler, if there is one.
        roles, optimizer, lr_scheduler: whose state is saved.
        stock_pipeline_class: writes the LoRA file.
        save_dtype: of the LoRA file.
        contract: what a resumed run must share, from `resume_contract`.
    """

    def __init__(
        self,
        training: TrainingSettings,
        accelerator: Accelerator,
        *,
        roles: StudentTeacherLoRA,
        optimizer: torch.optim.Optimizer,
        lr_scheduler: torch.optim.lr_scheduler.LRScheduler,
        stock_pipeline_class: type[DiffusionPipeline],
        save_dtype: torch.dtype,
        contract: dict[str, Any],
    ):
        self.folder, self.total_limit = Path(training.output_dir), training.checkpoints_total_limit
        self.accelerator, self.roles = accelerator, roles
        self.optimizer, self.lr_scheduler = optimizer, lr_scheduler
        self.stock_pipeline_class, self.save_dtype = stock_pipeline_class, save_dtype
        self.contract = contract

    def load(self, checkpoint: Path) -> int:
        """Restores what `save` wrote; returns the number of steps trained."""
        try:
            adapters = load_file(checkpoint / "adapters.safetensors")
            trainer_state = torch.load(checkpoint / "trainer_state.pt", map_location="cpu", weights_only=True)
        except (OSError, SafetensorError, RuntimeError, EOFError, UnpicklingError) as error:
            raise InputError(
                f"--resume_from_checkpoint {checkpoint.name}: is damaged ({first_line(error)}); remove it and resume "
                "again"
            ) from error
        self.roles.load_state_dict(adapters)
        self.optimizer.load_state_dict(trainer_state["optimizer"])
        self.lr_scheduler.load_state_dict(trainer_state["lr_scheduler"])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(trainer_state["scaler"])
        return read_state(checkpoint)["step"]

    def save(self, step: int) -> None:
        """Saves checkpoint-`step` on the main process, completely or not at all, and removes the oldest ones.

        Raises:
            OutputError: it cannot be written. Earlier checkpoints are left as they were.
        """
        target, unfinished = self.folder / f"checkpoint-{step}", self.folder / f".checkpoint-{step}.tmp"
        if not self.accelerator.is_main_process or checkpoint_step(target) == step:
            return
        with reporting_write_errors(self.folder, target.name):
            try:
                self._write(step, unfinished)
                os.rename(unfinished, target)
                sync_to_disk(self.folder)
            except BaseException:
                shutil.rmtree(unfinished, ignore_errors=True)
                raise
        logger.info(f"Saved {target}")
        self._remove_old(step)

    def _write(self, step: int, folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        adapters = {name: weight.cpu() for name, weight in self.roles.state_dict().items()}
        save_file(adapters, folder / "adapters.safetensors")
        trainer_state = {"optimizer": self.optimizer.state_dict(), "lr_scheduler": self.lr_scheduler.state_dict()}
        if self.accelerator.scaler is not None:
            trainer_state["scaler"] = self.accelerator.scaler.state_dict()
        save_state(trainer_state, folder / "trainer_state.pt")
        state = json.dumps({"step": step, "settings": self.contract}, indent=2)
        (folder / "state.json").write_text(state, encoding="utf-8")
        self.save_lora(folder)
        for path in (*folder.iterdir(), folder):
            sync_to_disk(path)

    def _remove_old(self, step: int) -> None:
        if self.total_limit is not None:
            older = [path for path in list_checkpoints(self.folder) if checkpoint_step(path) < step]
            for old in older[: max(0, len(older) + 1 - self.total_limit)]:
                # Renamed first: a run that is killed while deleting leaves no incomplete checkpoint.
                shutil.rmtree(old.rename(self.folder / f".{old.name}.tmp"))

    def save_lora(self, folder: Path) -> None:
        """Writes the student as stock diffusers reads it: to a temporary file first, then renamed."""
        weights, metadata = self.roles.export(self.save_dtype)
        unfinished = f".{LORA_FILE}.tmp"
        self.stock_pipeline_class.save_lora_weights(
            folder,
            transformer_lora_layers=weights,
            transformer_lora_adapter_metadata=metadata,
            weight_name=unfinished,
        )
        sync_to_disk(folder / unfinished)
        os.replace(folder / unfinished, folder / LORA_FILE)

    def save_final_lora(self) -> None:
        """Writes the LoRA file to the output folder or, if that fails, to a temporary folder.

        Raises:
            OutputError: it is in the temporary folder, which the message names.
        """
        try:
            with reporting_write_errors(self.folder, LORA_FILE):
                self.save_lora(self.folder)
        except OutputError as error:
            elsewhere = Path(tempfile.mkdtemp(prefix="dopsd-lora-"))
            self.save_lora(elsewhere)
            raise OutputError(f"{error}; the LoRA is in {elsewhere}, move it to a safe place") from error
        logger.info(f"The LoRA is {self.folder / LORA_FILE}; load it: pipe.load_lora_weights({str(self.folder)!r})")

    @contextmanager
    def saved_on_divergence(self, step: int, first_step: int) -> Iterator[None]:
        """Saves the weights before step `step` if that step diverges. The run started at `first_step`."""
        try:
            yield
        except TrainingDiverged as error:
            safe = f"no step was completed after step {first_step}"
            if step > first_step:
                self.save(step)
                safe = f"the weights before it are in checkpoint-{step}"
            self.accelerator.wait_for_everyone()  # The launcher ends all processes when one exits.
            raise TrainingDiverged(
                f"{error}; {safe}; start in another --output_dir with a lower --learning_rate (a checkpoint's folder "
                "can be --init_lora), or without fp16"
            ) from error
