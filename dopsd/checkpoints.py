"""Checkpoints, and what the run leaves: saving and loading them."""

import json
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError

from .context_cache import content_key
from .errors import OutputError, TrainingDiverged, first_line
from .history import sync_history
from .loading import reporting_library_errors
from .output import (
    check_is_shared,
    checkpoint_step,
    list_checkpoints,
    remove,
    reporting_write_errors,
    sync_to_disk,
    tidy_output_dir,
)
from .products import Product
from .resuming import STATE_FILE, file_digest, read_state
from .roles import Roles
from .settings import TrainingSettings
from .sharing import failing_together
from .stopping import StopRequest
from .training_state import TrainingState


logger = get_logger(__name__)

RETRY_SECONDS = 30


class Checkpoints:
    """Saves and loads what is trained, optimizer, scheduler and step; never the frozen base model.

    Args:
        training: names the output folder and the maximum number of checkpoints.
        accelerator: with its gradient scaler, if there is one.
        roles: whose student is saved.
        state: of the roles and their optimizer.
        lr_scheduler: whose state is saved.
        product: what is saved of the student.
        contract: what a resumed run must share, from `resume_contract`.
    """

    def __init__(
        self,
        training: TrainingSettings,
        accelerator: Accelerator,
        *,
        roles: Roles,
        state: TrainingState,
        lr_scheduler: torch.optim.lr_scheduler.LRScheduler,
        product: Product,
        contract: dict[str, Any],
    ):
        self.folder, self.total_limit = Path(training.output_dir), training.checkpoints_total_limit
        self.accelerator, self.roles, self.state = accelerator, roles, state
        self.lr_scheduler, self.product = lr_scheduler, product
        self.contract = contract

    def resume(self, checkpoint: Path | None) -> int:
        """Loads the checkpoint, if there is one, and tidies the output folder; returns the number of steps trained."""
        if self.state.is_collective:
            check_is_shared(self.folder, self.accelerator)
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
            others = self.state.read(checkpoint)
            self.lr_scheduler.load_state_dict(others["lr_scheduler"])
            if self.accelerator.scaler is not None:
                self.accelerator.scaler.load_state_dict(others["scaler"])
        return read_state(checkpoint)["step"]

    def save(self, step: int) -> None:
        """Saves checkpoint-`step`, completely or not at all, and removes the oldest ones.

        The main process writes it, and all of them if each holds a part of the state.

        Raises:
            OutputError: it cannot be written. Earlier checkpoints are left as they were.
        """
        target, unfinished = self.folder / f"checkpoint-{step}", self.folder / f".checkpoint-{step}.tmp"
        is_main, together = self.accelerator.is_main_process, self.state.is_collective
        exists = checkpoint_step(target) == step
        if together:
            exists = broadcast_object_list([exists])[0]
        if exists or not (is_main or together):
            return
        try:
            for stage in (self._begin, self._write, self._complete):
                with (
                    failing_together() if together else nullcontext(),
                    reporting_write_errors(self.folder, target.name),
                ):
                    stage(step, unfinished)
            if is_main:
                with reporting_write_errors(self.folder, target.name):
                    os.rename(unfinished, target)
                    sync_to_disk(self.folder)
        except BaseException:
            if is_main:
                remove(unfinished)
            raise
        if is_main:
            logger.info(f"Saved {target}")
            self._remove_old(step)

    def _begin(self, step: int, folder: Path) -> None:
        if self.accelerator.is_main_process:
            sync_history(self.folder)
            remove(folder)
            folder.mkdir(parents=True)

    def _write(self, step: int, folder: Path) -> None:
        others = {"lr_scheduler": self.lr_scheduler.state_dict()}
        if self.accelerator.scaler is not None:
            others["scaler"] = self.accelerator.scaler.state_dict()
        self.state.write(folder, others)

    def _complete(self, step: int, folder: Path) -> None:
        is_main = self.accelerator.is_main_process
        weights = self.product.collect(self.roles, keep=is_main, is_end=False)
        if not is_main:
            return
        self.product.write(weights, folder)
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        digests = {path.relative_to(folder).as_posix(): file_digest(path) for path in paths}
        state = {"step": step, "settings": self.contract, "files": digests}
        content = json.dumps(state | {"checksum": content_key(state)}, indent=2)
        (folder / STATE_FILE).write_text(content, encoding="utf-8")
        for path in (*folder.rglob("*"), folder):
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

    def save_final(self, stop: StopRequest) -> None:
        """Writes what the run leaves to the output folder or, if that fails, to a folder elsewhere.

        If there is no room anywhere, it waits until there is some, or until the run is asked to stop.

        Raises:
            OutputError: it is elsewhere, as the message says, or nowhere.
        """
        is_main, noun = self.accelerator.is_main_process, self.product.noun
        weights = None
        if is_main or self.product.is_collective:
            weights = self.product.collect(self.roles, keep=is_main, is_end=True)
        if not is_main:
            return
        while True:
            try:
                with reporting_write_errors(self.folder, self.product.name):
                    self.product.finish(weights, self.folder)
                break
            except OutputError as error:
                if elsewhere := self.save_elsewhere(weights):
                    raise OutputError(f"{error}; the {noun} is in {elsewhere}, move it to a safe place") from error
                if stop.is_set:
                    raise
                logger.error(f"{error}. There is no room elsewhere either. Trying again every {RETRY_SECONDS} seconds")
                for _ in range(RETRY_SECONDS):
                    if not stop.is_set:
                        time.sleep(1)
        logger.info(self.product.loading_line(self.folder))

    def save_elsewhere(self, weights: Any) -> Path | None:
        """Writes the weights to a new folder on another disk; None if none has room."""
        for place in dict.fromkeys([tempfile.gettempdir(), str(Path.home())]):
            folder = None
            try:
                folder = Path(tempfile.mkdtemp(prefix="dopsd-", dir=place))
                self.product.write(weights, folder)
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
            raise TrainingDiverged(f"{error}; {safe}; {self.product.restart}") from error
