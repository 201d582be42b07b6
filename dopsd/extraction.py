"""A whole model's change as a LoRA (`--extract_lora`): each matrix's change, truncated to its largest singular values.

Of all matrices of that rank, that is the nearest (Eckart and Young, 1936).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig
from torch import nn
from tqdm.auto import tqdm


# Up to this many rows or columns, all singular values are computed. Beyond, a randomized method (Halko, Martinsson and
# Tropp, 2011) finds the largest with some more columns than the rank and a few passes over the matrix.
MAX_EXACT_SIZE = 512
ADDITIONAL_COLUMNS, NUM_PASSES = 16, 4


@dataclass(frozen=True)
class ExtractedLoRA:
    """A change of low rank, and how much of the whole change it is.

    Attributes:
        rank: the wanted one, or less if no matrix has as many rows and columns.
        factors: module -> A (r, in) and B (out, r) in float32 on the CPU; r is the rank, or less in a smaller matrix.
        share: of the sum of squares of the change of all weights, what the LoRA holds.
        share_outside: of that sum, what is in weights that a LoRA does not change: norms, biases, embeddings.
    """

    rank: int
    factors: dict[str, tuple[torch.Tensor, torch.Tensor]]
    share: float
    share_outside: float

    @property
    def modules(self) -> list[str]:
        return sorted(self.factors)

    def export(self, dtype: torch.dtype) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Weights and metadata as `save_lora_weights` expects them, with alpha = rank.

        A smaller matrix's factors are filled up with zeros, so that all modules have one rank.
        """
        weights = {}
        for module, (down, up) in self.factors.items():
            missing = self.rank - len(down)
            weights[f"{module}.lora_A.weight"] = nn.functional.pad(down, (0, 0, 0, missing)).to(dtype)
            weights[f"{module}.lora_B.weight"] = nn.functional.pad(up, (0, missing)).to(dtype)
        config = LoraConfig(r=self.rank, lora_alpha=self.rank, inference_mode=True).to_dict()
        return weights, config | {"target_modules": self.modules}


def extract_lora(
    skeleton: nn.Module,
    student: Mapping[str, torch.Tensor],
    base: Callable[[str], torch.Tensor],
    *,
    rank: int,
    device: torch.device,
) -> ExtractedLoRA:
    """The LoRA that is nearest to the student's change.

    Args:
        skeleton: the transformer, on the meta device. Only its `nn.Linear` modules' matrices are in the LoRA.
        student: its weights, by name.
        base: name -> the weight before training.
        device: computes the decompositions, unless it has too little memory.

    Raises:
        ValueError: no linear module's matrix has changed.
    """
    matrices = {f"{name}.weight": name for name, module in skeleton.named_modules() if isinstance(module, nn.Linear)}
    total = held = outside = 0.0
    factors = {}
    for name, weight in tqdm(student.items(), desc="Extracting the LoRA", leave=False):
        change = weight.float() - base(name).float()
        size = sum_of_squares(change)
        total += size
        if name not in matrices:
            outside += size
        elif size > 0:
            down, up, squares = factorized(change, rank, device)
            factors[matrices[name]] = down, up
            held += squares
    if not factors:
        raise ValueError("training has changed no linear module's matrix")
    largest = max(len(down) for down, _ in factors.values())
    return ExtractedLoRA(largest, factors, held / total, outside / total)


def sum_of_squares(tensor: torch.Tensor) -> float:
    return tensor.square().sum(dtype=torch.float64).item()


def factorized(change: torch.Tensor, rank: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, float]:
    """A (r, in) and B (out, r), whose product is the change truncated to rank r, and its sum of squares."""
    try:
        left, values, right = truncated_svd(change.to(device), rank)
    except torch.OutOfMemoryError:
        left, values, right = truncated_svd(change, rank)
    root = values.sqrt()
    return (root * right).T.contiguous().cpu(), (left * root).contiguous().cpu(), sum_of_squares(values)


def truncated_svd(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """U (out, r), S (r,) and V (in, r) of the largest singular values, at most `rank` of them."""
    size = min(matrix.shape)
    if size <= max(MAX_EXACT_SIZE, 2 * rank):
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        right = right.T
    else:
        with torch.random.fork_rng([matrix.device] if matrix.device.type == "cuda" else []):
            torch.manual_seed(0)
            left, values, right = torch.svd_lowrank(matrix, min(rank + ADDITIONAL_COLUMNS, size), NUM_PASSES)
    return left[:, :rank], values[:rank], right[:, :rank]
