"""The roles of the one transformer: student, teacher and base. What is trained decides how they are kept apart."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Literal

import torch
from torch import nn


TeacherKind = Literal["ema", "base", "student"]


class Roles(ABC):
    """Lets one transformer act as student, teacher and base.

    Outside of the role context managers it is the student, with gradients.

    Attributes:
        transformer: a diffusers model.
        teacher: weights of the teacher. "ema" is an exponential moving average of the student's, "base" the model
            before training, "student" the student's current weights.
        averages_gradients: whether a backward pass leaves the mean of all processes' gradients, if they share the
            transformer's weights.
        teacher_is_off_device, base_is_off_device: whether the role's weights come to the accelerator at each call.
    """

    transformer: nn.Module
    teacher: TeacherKind
    averages_gradients: bool = False
    teacher_is_off_device: bool = False
    base_is_off_device: bool = False

    @property
    @abstractmethod
    def student_parameters(self) -> list[nn.Parameter]:
        """What the optimizer changes."""

    @abstractmethod
    def describe(self) -> str:
        """What is trained, in a few words."""

    @abstractmethod
    def teacher_role(self) -> AbstractContextManager[None]:
        """Context in which the transformer is the teacher, without gradients or dropout."""

    @abstractmethod
    def base_role(self) -> AbstractContextManager[None]:
        """Context in which the transformer is the model before training, without gradients."""

    @abstractmethod
    def shipped_role(self, dtype: torch.dtype) -> AbstractContextManager[None]:
        """Context in which the transformer computes what the stock pipeline computes with the saved result.

        Args:
            dtype: in which it is saved.
        """

    @abstractmethod
    def idle_role(self) -> AbstractContextManager[None]:
        """Context for calls whose result is not used, without gradients or dropout.

        The shared weights are the student's.
        """

    @abstractmethod
    def after_optimizer_step(self, ema_decay: float) -> None:
        """Updates what follows from the student's weights, such as the teacher's average of them."""

    def as_teacher(self, function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        """Wraps a function so that it runs in the teacher's role."""
        return _in_role(self.teacher_role, function)

    def as_base(self, function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        """Wraps a function so that it runs in the base model's role."""
        return _in_role(self.base_role, function)


def _in_role(
    role: Callable[[], AbstractContextManager[None]], function: Callable[..., torch.Tensor]
) -> Callable[..., torch.Tensor]:
    def in_role(*args, **kwargs) -> torch.Tensor:
        with role():
            return function(*args, **kwargs)

    return in_role
