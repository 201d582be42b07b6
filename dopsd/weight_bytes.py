"""What training whole weights keeps, in bytes per weight. The run and its plan go by the same figures."""

from dataclasses import dataclass

import torch

from .settings import Settings


# Share of a GPU that activations take at most in the presets.
ROOM_FOR_ACTIVATIONS = 0.2

# torchao's 8-bit AdamW keeps two moments, each with a float32 scale for 256 numbers.
EIGHT_BIT_STATES = 2 * (1 + 4 / 256)


@dataclass(frozen=True)
class WeightBytes:
    """For each trained weight, besides the weight itself.

    Attributes:
        gradient, master: of what the optimizer changes.
        states: of the optimizer.
        ema: the teacher's average.
        base: the weight before training.
        has_base: whether training needs the base model at each step. Otherwise it is in host memory.
    """

    gradient: int
    master: int
    states: float
    ema: int
    base: int
    has_base: bool

    @property
    def copies(self) -> int:
        """Of the teacher's and the base model's weights, where `--ema_device` puts them."""
        return self.ema + self.base * self.has_base

    def copies_fit(self, count: int, free: float, total: float) -> bool:
        """Whether they may be on a GPU beside the rest (`--ema_device auto`).

        Args:
            count: trained weights of a process.
            free: bytes of the GPU that are left when it has the transformer.
            total: all of its bytes.
        """
        return count * (self.gradient + self.master + self.states + self.copies) <= free - ROOM_FOR_ACTIVATIONS * total


def weight_bytes(settings: Settings, dtype: torch.dtype, *, has_prior: bool) -> WeightBytes:
    """Of `--train_mode full`.

    Args:
        dtype: of the weights.
        has_prior: whether training needs the base model at each step, for prior preservation.
    """
    own, teacher = dtype.itemsize, settings.distillation.teacher
    has_masters = dtype != torch.float32 and not settings.full.rounds_at_random
    trained = torch.float32.itemsize if has_masters else own
    return WeightBytes(
        gradient=trained,
        master=trained * has_masters,
        states=EIGHT_BIT_STATES if settings.optimizer.use_8bit_adam else 2 * torch.float32.itemsize,
        ema=torch.float32.itemsize * (teacher == "ema"),
        base=own,
        has_base=has_prior or teacher == "base",
    )
