"""GPUs: their memory and their speed in bfloat16.

TFLOP/s are dense matrix products with float32 accumulation, from NVIDIA's architecture white papers (GA102, Ada,
RTX Blackwell) and data sheets (A10, L4, L40S, A40, RTX A6000, RTX 6000 Ada, A100, H100, H200, B200); data sheets that
state only the rate with sparsity are halved.
"""

import re
from dataclasses import dataclass
from typing import Literal


# What CUDA's context and libraries take, and what gaps between allocations and kernels' own buffers take.
RESERVED_BYTES, RESERVED_SHARE = 0.8e9, 0.05


@dataclass(frozen=True)
class Card:
    """A GPU.

    Attributes:
        name: for messages.
        memory_gb: of its memory, in GB.
        tflops: bfloat16 TFLOP/s; None if unknown.
    """

    name: str
    memory_gb: float
    tflops: float | None

    @property
    def usable_bytes(self) -> float:
        """What a run's tensors may take."""
        return (self.memory_gb * 1e9 - RESERVED_BYTES) / (1 + RESERVED_SHARE)


# name -> (GB, TFLOP/s, what torch calls it)
_TABLE: dict[str, tuple[float, float, str]] = {
    "rtx-3060-12gb": (12, 25.4, "RTX 3060"),
    "rtx-3080-10gb": (10, 59.5, "RTX 3080"),
    "rtx-3090": (24, 71, "RTX 3090"),
    "rtx-4060-8gb": (8, 30.2, "RTX 4060"),
    "rtx-4060-ti-16gb": (16, 44.1, "RTX 4060 Ti"),
    "rtx-4070-12gb": (12, 58.3, "RTX 4070"),
    "rtx-4070-ti-super-16gb": (16, 88.2, "RTX 4070 Ti SUPER"),
    "rtx-4080-16gb": (16, 97.5, "RTX 4080"),
    "rtx-4090": (24, 165.2, "RTX 4090"),
    "rtx-5060-ti-16gb": (16, 47.4, "RTX 5060 Ti"),
    "rtx-5070-12gb": (12, 61.7, "RTX 5070"),
    "rtx-5080-16gb": (16, 112.6, "RTX 5080"),
    "rtx-5090": (32, 209.5, "RTX 5090"),
    "rtx-a6000": (48, 154.8, "RTX A6000"),
    "rtx-6000-ada": (48, 364.2, "RTX 6000 Ada Generation"),
    "a10": (24, 125, "A10"),
    "a40": (48, 149.7, "A40"),
    "l4": (24, 121, "L4"),
    "l40s": (48, 362, "L40S"),
    "a100-40gb": (40, 312, "A100-40GB"),
    "a100-80gb": (80, 312, "A100-80GB"),
    "h100": (80, 989, "H100"),
    "h200": (141, 989, "H200"),
    "b200": (180, 2250, "B200"),
}
# Cards of which only the memory is known, in GB.
MEMORY_SIZES = (8, 12, 16, 24, 48, 80)

CARDS = {name: Card(title, memory_gb, tflops) for name, (memory_gb, tflops, title) in _TABLE.items()}
CARDS |= {f"{size}gb": Card("any card", size, None) for size in MEMORY_SIZES}
CardName = Literal[tuple(CARDS)]

# Words in torch's names that do not tell cards of different speed apart.
_NEUTRAL_WORDS = re.compile(r"NVIDIA|GeForce|GPU|SXM\d?|HBM\d\w?|\d+GB")


def this_card() -> Card | None:
    """This machine's first GPU, with the memory that torch sees."""
    import torch  # takes seconds; the flags need this module's names at once

    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    return Card(properties.name, properties.total_memory / 1e9, rate(properties.name))


def rate(device_name: str) -> float | None:
    """TFLOP/s of the card in the table that torch calls so; None if there is none.

    Every word counts: a Ti, SUPER, Laptop, NVL or PCIe that is not in the table is another card.
    """
    rates = {_telling_words(card.name): card.tflops for card in CARDS.values()}
    return rates.get(_telling_words(device_name))


def _telling_words(name: str) -> tuple[str, ...]:
    return tuple(word for word in re.split(r"[\s-]+", name) if not _NEUTRAL_WORDS.fullmatch(word))
