"""The weights and optimizer states of a checkpoint."""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from .errors import InputError, device_errors, first_line
from .lora_roles import StudentTeacherLoRA
from .output import ADAPTERS_FILE
from .weight_roles import StudentTeacherWeights


TRAINER_FILE, WEIGHTS_DIR = "trainer_state.pt", "weights"
INCOMPLETE_FILE = ("inline_container", "unexpected pos", "write failed")  # in torch's messages


class TrainingState(ABC):
    """What a checkpoint holds of the roles and the optimizer.

    Attributes:
        is_collective: whether all processes write and read it together, since each holds a part.
    """

    is_collective: bool

    @abstractmethod
    def write(self, folder: Path, others: dict[str, Any]) -> None:
        """Writes it into a folder, with other small states. Raises OSError or SafetensorError if it cannot."""

    @abstractmethod
    def read(self, folder: Path) -> dict[str, Any]:
        """Restores it, and returns the other states."""


def save_state(state: dict[str, Any], path: Path) -> None:
    """`torch.save`, whose RuntimeError for a full disk becomes an OSError. Errors of the GPU stay what they are."""
    try:
        torch.save(state, path)
    except RuntimeError as error:
        if isinstance(error, device_errors()):
            raise
        raise OSError(write_failure(error)) from error


def write_failure(error: BaseException) -> str:
    """Its first line; in plain words, if torch's says only where in a file it has noticed that bytes are missing."""
    text = first_line(error)
    return "the file could not be completed" if any(words in text for words in INCOMPLETE_FILE) else text


def load_state(path: Path) -> dict[str, Any]:
    return torch.load(path, map_location="cpu", weights_only=True)


class AdapterState(TrainingState):
    """The adapters and their optimizer, written by one process."""

    is_collective = False

    def __init__(self, roles: StudentTeacherLoRA, optimizer: torch.optim.Optimizer):
        self.roles, self.optimizer = roles, optimizer

    def write(self, folder: Path, others: dict[str, Any]) -> None:
        save_file({name: weight.cpu() for name, weight in self.roles.state_dict().items()}, folder / ADAPTERS_FILE)
        save_state({"optimizer": self.optimizer.state_dict(), **others}, folder / TRAINER_FILE)

    def read(self, folder: Path) -> dict[str, Any]:
        adapters, others = load_file(folder / ADAPTERS_FILE), load_state(folder / TRAINER_FILE)
        self.roles.load_state_dict(adapters)
        self.optimizer.load_state_dict(others.pop("optimizer"))
        return others


class WeightState(TrainingState):
    """The transformer's weights, their averages and the optimizer's states, by torch.distributed.checkpoint.

    Each process writes its part. Another number of processes can read them.
    """

    is_collective = True

    def __init__(self, roles: StudentTeacherWeights, optimizer: torch.optim.Optimizer):
        self.roles = roles
        self.optimizer = getattr(optimizer, "optimizer", optimizer)  # without accelerate's wrapper
        # The optimizer's states get the names of the weights.
        self.named = nn.Module()
        for name, parameter in roles.trained.items():
            self.named.register_parameter(name.replace(".", "/"), parameter)

    def state_dict(self) -> dict[str, Any]:
        """The tensors themselves, into which they are read again. The optimizer's are made if there are none yet."""
        states = get_optimizer_state_dict(self.named, self.optimizer)["state"]
        return {**self.roles.state_dict(), "optimizer": states}

    def write(self, folder: Path, others: dict[str, Any]) -> None:
        try:
            with alone_without_warning() as no_dist:
                dcp.save(self.state_dict(), checkpoint_id=folder / WEIGHTS_DIR, no_dist=no_dist)
        except CheckpointException as error:
            raise write_error(error) from error
        if not dist.is_initialized() or dist.get_rank() == 0:
            groups = [{key: value for key, value in group.items() if key != "params"} for group in self.groups]
            groups_and_others = {"param_groups": groups, "num_processes": num_processes(), **others}
            save_state(groups_and_others, folder / TRAINER_FILE)

    def read(self, folder: Path) -> dict[str, Any]:
        others = load_state(folder / TRAINER_FILE)
        before = others.pop("num_processes")
        try:
            with alone_without_warning() as no_dist:
                dcp.load(self.state_dict(), checkpoint_id=folder / WEIGHTS_DIR, no_dist=no_dist)
        except (CheckpointException, ValueError) as error:
            if before == num_processes():
                raise
            raise InputError(
                f"--resume_from_checkpoint {folder.name}: {before} processes saved it, and its 8-bit states cannot be "
                f"divided among {num_processes()}; resume it with {before}"
            ) from error
        self.roles.copy_masters_to_weights()
        # `load_state_dict` would cast float32 states to the dtype of bfloat16 weights.
        for group, saved in zip(self.groups, others.pop("param_groups"), strict=True):
            group.update(saved)
        return others

    @property
    def groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups


def num_processes() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


@contextmanager
def alone_without_warning() -> Iterator[bool]:
    """Whether there is one process without a group, of which torch would warn."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield not dist.is_initialized()


def write_error(error: CheckpointException) -> Exception:
    """The first process's failure; one of the GPU stays what it is."""
    failure = next(iter(error.failures.values()))[0]
    if isinstance(failure, (OSError, *device_errors())):
        return failure
    return OSError(write_failure(failure))
