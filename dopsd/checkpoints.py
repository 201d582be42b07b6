"""Checkpoints and the LoRA file: saving, finding and loading them, and which settings a resumed run must keep."""

import hashlib
import json
import os
import shutil
import tempfile
import time
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
from .errors import InputError, OutputError, TrainingDiverged, device_errors, first_line
from .files import read_regular_file
from .history import sync_history
from .model import Conditioning
from .output import (
    LORA_FILE,
    checkpoint_step,
    list_checkpoints,
    replacing,
    reporting_write_errors,
    sync_to_disk,
    tidy_output_dir,
)
from .pretrained import model_identity
from .roles import StudentTeacherLoRA
from .settings import Settings, TrainingSettings
from .stopping import StopRequest


logger = get_logger(__name__)

PICTURES = "pictures and captions"

ADAPTERS_FILE, TRAINER_FILE, STATE_FILE = "adapters.safetensors", "trainer_state.pt", "state.json"
CHECKPOINT_FILES = (ADAPTERS_FILE, TRAINER_FILE, LORA_FILE)  # listed in the state file with their SHA-256

RETRY_SECONDS = 30


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
    """The checkpoint to resume from, whose files are as they were saved; None for a new run.

    Raises:
        InputError: there is none, or this run would overwrite another one's results or mix with them.
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
        return newest_intact(existing)
    for path in (output_dir / wanted, Path(wanted)):
        if checkpoint_step(path) >= 0:
            if existing and checkpoint_step(existing[-1]) > checkpoint_step(path):
                raise InputError(
                    f"--resume_from_checkpoint {wanted}: {output_dir} holds newer checkpoints ({names}), which this "
                    "run would mix with; move them away, or resume from latest"
                )
            if problem := damage(path):
                raise InputError(f"--resume_from_checkpoint {wanted}: {problem}; resume from latest")
            return path
    raise InputError(f"--resume_from_checkpoint {wanted}: there is no such checkpoint; {output_dir} has: {names}")


def refuse_finished(output_dir: Path) -> None:
    if (output_dir / LORA_FILE).exists():
        raise InputError(
            f"--output_dir {output_dir}: holds a finished run's {LORA_FILE} and no checkpoint to continue from; "
            "choose another folder"
        )


def newest_intact(checkpoints: list[Path]) -> Path | None:
    """The newest checkpoint that is not damaged; None if there are no checkpoints.

    Args:
        checkpoints: oldest first.

    Raises:
        InputError: all of them are damaged.
    """
    for path in reversed(checkpoints):
        problem = damage(path)
        if problem is None:
            return path
        logger.warning(f"{path}: {problem}; trying the checkpoint before it")
    if checkpoints:
        raise InputError(
            f"--resume_from_checkpoint latest: no checkpoint in {checkpoints[0].parent} is intact; move them away to "
            "start anew"
        )
    return None


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint; None if its files are as they were saved."""
    try:
        state = read_state(checkpoint)
        if missing := [name for name in CHECKPOINT_FILES if not (checkpoint / name).is_file()]:
            return f"it has no {missing[0]}"
        if not state["files"]:
            logger.warning(f"{checkpoint}: an older version saved it without checksums, so it is not verified")
        for name, digest in state["files"].items():
            if file_digest(checkpoint / name) != digest:
                return f"{name} is damaged or from another checkpoint"
        if state["step"] != checkpoint_step(checkpoint):
            return f"it is the checkpoint of step {state['step']}"
    except InputError as error:
        return str(error)
    except OSError as error:
        return f"cannot be read ({first_line(error)})"
    return None


def file_digest(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_state(checkpoint: Path) -> dict[str, Any]:
    """A checkpoint's step, the settings that it was trained with, and the SHA-256 of its other files.

    Older versions saved no digests; "files" is then empty.

    Raises:
        InputError: the file is damaged. The message does not name the checkpoint.
    """
    try:
        state = json.loads(read_regular_file(checkpoint / STATE_FILE))
        if state.keys() == {"step", "settings"} and isinstance(state["settings"], dict):
            return state | {"files": {}}
        checksum = state.pop("checksum")
        if checksum == content_key(state) and state["files"].keys() == {*CHECKPOINT_FILES}:
            return state
        problem = "is damaged"
    except FileNotFoundError:
        problem = "is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        problem = "is damaged"
    raise InputError(f"its {STATE_FILE} {problem}")


def check_resumable(checkpoint: Path, contract: dict[str, Any], max_train_steps: int) -> None:
    """Raises `InputError` if the run's contract differs from the checkpoint's, or it has too few steps."""
    flag, state = f"--resume_from_checkpoint {checkpoint.name}", read_state(checkpoint)
    saved_contract = state["settings"]
    # An older version did not know all of today's flags.
    new = contract if state["files"] else {}
    for name in dict.fromkeys([*saved_contract, *new]):
        saved, now = saved_contract.get(name), contract.get(name)
        if saved == now:
            continue
        if name == PICTURES and saved and now:
            changed = sorted(
                picture for picture in saved.keys() | now.keys() if saved.get(picture) != now.get(picture)
            )
            raise InputError(
                f"{flag}: {changed[0]} or its caption was added, changed or removed (pictures affected: "
                f"{len(changed)}); undo that, or start in another --output_dir"
            )
        raise InputError(
            f"{flag}: its {name} was {saved}, now it is {now}; pass the same, or start in another --output_dir"
        )
    if state["step"] > max_train_steps:
        raise InputError(
            f"--max_train_steps {max_train_steps}: {checkpoint.name} is past it; pass at least {state['step']}, or "
            "use the LoRA in that folder"
        )


# Saving and loading


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
        try:
            adapters = load_file(checkpoint / ADAPTERS_FILE)
            trainer_state = torch.load(checkpoint / TRAINER_FILE, map_location="cpu", weights_only=True)
        except (OSError, SafetensorError, RuntimeError, EOFError, UnpicklingError) as error:  # no checksums
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
            sync_history(self.folder)
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
                # Renamed first: a run that is killed while deleting leaves no incomplete checkpoint.
                shutil.rmtree(old.rename(self.folder / f".{old.name}.tmp"))

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
                time.sleep(RETRY_SECONDS)
        logger.info(f"The LoRA is {self.folder / LORA_FILE}; load it: pipe.load_lora_weights({str(self.folder)!r})")

    def save_elsewhere(self) -> Path | None:
        """Writes the LoRA file to a new folder on another disk; None if none has room."""
        for place in {tempfile.gettempdir(): None, str(Path.home()): None}:
            folder = None
            try:
                folder = Path(tempfile.mkdtemp(prefix="dopsd-lora-", dir=place))
                self.save_lora(folder)
                return folder
            except (OSError, SafetensorError):
                if folder is not None:
                    shutil.rmtree(folder, ignore_errors=True)
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
