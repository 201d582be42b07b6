"""Ending a run early without losing work: signals, and launchers that die."""

import os
import signal
import sys
from types import FrameType

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger

from .tracking import end_training


logger = get_logger(__name__)

# A second one of these ends the process at once.
URGENT_SIGNALS = (signal.SIGTERM, signal.SIGINT)
# A closed terminal, and Slurm's warning before a job's time is over. They may come twice, or with a SIGTERM.
WARNING_SIGNALS = tuple(getattr(signal, name) for name in ("SIGHUP", "SIGUSR1") if hasattr(signal, name))


class StopRequest:
    """Set by a signal or the launcher's death. The run finishes its step, saves a checkpoint and ends.

    During validation, it finishes only the image that it is drawing. Before training, there is nothing to save: a
    signal ends the process at once, with one line. A signal that the parent process ignores, as under nohup, stays
    ignored.

    Create it first: a launcher that has died before cannot be noticed.
    """

    def __init__(self):
        self.reason: str | None = None
        self.exit_code = 1
        self.is_training = False
        self._launcher = os.getppid()
        for number in (*URGENT_SIGNALS, *WARNING_SIGNALS):
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._on_signal)

    def begin_training(self) -> None:
        """From now on, a signal is a request."""
        self.is_training = True

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if not self.is_training:
            print(f"\n{name} before the first step; finished encodings are kept in the context cache", file=sys.stderr)
            sys.exit(128 + number)
        if number in URGENT_SIGNALS:
            for handled in URGENT_SIGNALS:
                signal.signal(handled, signal.SIG_DFL)
        if self.reason is None:
            self.reason, self.exit_code = name, 128 + number

    @property
    def is_set(self) -> bool:
        # With one process, `accelerate launch` dies on SIGTERM and leaves its child training.
        if self.reason is None and os.getppid() != self._launcher:
            self.reason = "its launcher has ended"
        return self.reason is not None

    def is_set_on_any(self, accelerator: Accelerator) -> bool:
        """Whether any process was asked to stop. All processes get the same answer, and must all ask."""
        asked = torch.tensor(float(self.is_set), device=accelerator.device)
        return accelerator.reduce(asked, reduction="sum").item() > 0

    def end_run(self, accelerator: Accelerator, step: int) -> None:
        """Exits after checkpoint-`step` was saved."""
        accelerator.wait_for_everyone()  # The launcher ends all processes when the first one exits.
        logger.info(
            f"Stopped after step {step} ({self.reason or 'requested on another process'}); checkpoint-{step} is "
            "saved. Continue with the same command and --resume_from_checkpoint latest"
        )
        end_training(accelerator)
        sys.exit(self.exit_code)
