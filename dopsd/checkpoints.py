"""Checkpoints and the LoRA file: saving and loading them."""

import json
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from diffusers import DiffusionPipeline
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from .context_cache import content_key
from .errors import OutputError, TrainingDiverged, device_errors, first_line
from .history import sync_history
from .loading import reporting_library_errors
from .output import (
    ADAPTERS_FILE,
    LORA_FILE,
    checkpoint_step,
    list_checkpoints,
    remove,
    replacing,
    reporting_write_errors,
    sync_to_disk,
    tidy_output_dir,
)
from .resuming import CHECKPOINT_FILES, STATE_FILE, TRAINER_FILE, file_digest, read_state
from .roles import StudentTeacherLoRA
from .settings import TrainingSettings
from .stopping import StopRequest


logger = get_logger(__name__)

RETRY_SECONDS = 30


def save_state(state: dict[str, Any], path: Path) -> None:
    """`torch.save`, whose RuntimeError for a full disk becomes an OSError. Errors of the GPU stay what they are."""
    try:
        torch.save(state, path)
    except RuntimeError as error:
        if isinstance(error, device_errors()):
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

    def resume(self, checkpoint: Path | None) -> int:
        """Loads the checkpoint, if there is one, and tidies the output folder; returns the number of steps trained."""
        first_step = 0 if checkpoint is None else self.load(checkpoint)
        if self.accelerator.is_main_process:
            tidy_output_dir(self.folder, first_step)
        return first_step

    def load(self, checkpoint: Path) -> int:
        """Restores what `save` wrote; returns the number of steps trained. `damage` has found nothing wrong."""
        # Older versions saved no checksums, so their files may be damaged after all.
        with reporting_library_errors(
            f"--resume_from_checkpoint {checkpoint.name}: is damaged", "remove it and resume again"
        ):
            adapters = load_file(checkpoint / ADAPTERS_FILE)
            trainer_state = torch.load(checkpoint / TRAINER_FILE, map_location="cpu", weights_only=True)
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
            sync_history(self.folder)
            try:
                self._write(step, unfinished)
                os.rename(unfinished, target)
                sync_to_disk(self.folder)
            except BaseException:
                remove(unfinished)
                raise
        logger.info(f"Saved {target}")
        self._remove_old(step)

    def _write(self, step: int, folder: Path) -> None:
        remove(folder)
        folder.mkdir(parents=True)
        adapters = {name: weight.cpu() for name, weight in self.roles.state_dict().items()}
        save_file(adapters, folder / ADAPTERS_FILE)
        trainer_state = {"optimizer": self.optimizer.state_dict(), "lr_scheduler": self.lr_scheduler.state_dict()}
        if self.accelerator.scaler is not None:
            trainer_state["scaler"] = self.accelerator.scaler.state_dict()
        save_state(trainer_state, folder / TRAINER_FILE)
        self.save_lora(folder)
        digests = {name: file_digest(folder / name) for name in CHECKPOINT_FILES}
        state = {"step": step, "settings": self.contract, "files": digests}
        content = json.dumps(state | {"checksum": content_key(state)}, indent=2)
        (folder / STATE_FILE).write_text(content, encoding="utf-8")
        for path in (*folder.iterdir(), folder):
            sync_to_disk(path)

    def _remove_old(self, step: int) -> None:
        if self.total_limit is not None:
            older = [path for path in list_checkpoints(self.folder) if checkpoint_step(path) < step]
            for old in older[: max(0, len(older) + 1 - self.total_limit)]:
                leaving = self.folder / f".{old.name}.tmp"
                remove(leaving)
                try:
                    # Renamed first: a run that is killed while deleting leaves no incomplete checkpoint.
                    remove(old.rename(leaving))
                except OSError as error:
                    logger.warning(f"{old} could not be removed ({first_line(error)}); the run continues")

    def save_lora(self, folder: Path) -> None:
        """Writes the student as stock diffusers reads it."""
        weights, metadata = self.roles.export(self.save_dtype)
        with replacing(folder / LORA_FILE) as unfinished:
            self.stock_pipeline_class.save_lora_weights(
                folder,
                transformer_lora_layers=weights,
                transformer_lora_adapter_metadata=metadata,
                weight_name=unfinished.name,
            )

    def save_final_lora(self, stop: StopRequest) -> None:
        """Writes the LoRA file to the output folder or, if that fails, to a folder elsewhere.

        If there is no room anywhere, it waits until there is some, or until the run is asked to stop.

        Raises:
            OutputError: the LoRA is elsewhere, as the message says, or nowhere.
        """
        while True:
            try:
                with reporting_write_errors(self.folder, LORA_FILE):
                    self.save_lora(self.folder)
                break
            except OutputError as error:
                if elsewhere := self.save_elsewhere():
                    raise OutputError(f"{error}; the LoRA is in {elsewhere}, move it to a safe place") from error
                if stop.is_set:
                    raise
                logger.error(f"{error}. There is no room elsewhere either. Trying again every {RETRY_SECONDS} seconds")
                for _ in range(RETRY_SECONDS):
                    if not stop.is_set:
                        time.sleep(1)
        logger.info(f"The LoRA is {self.folder / LORA_FILE}; load it: pipe.load_lora_weights({str(self.folder)!r})")

    def save_elsewhere(self) -> Path | None:
        """Writes the LoRA file to a new folder on another disk; None if none has room."""
        for place in dict.fromkeys([tempfile.gettempdir(), str(Path.home())]):
            folder = None
            try:
                folder = Path(tempfile.mkdtemp(prefix="dopsd-lora-", dir=place))
                self.save_lora(folder)
                return folder
            except (OSError, SafetensorError):
                if folder is not None:
                    remove(folder)
        return None

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
