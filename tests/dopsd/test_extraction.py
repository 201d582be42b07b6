"""A LoRA from the change of a whole model."""

import pytest
import torch
from torch import nn

from dopsd import extraction
from dopsd.extraction import extract_lora


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.wide = nn.Linear(40, 8)
        self.tall = nn.Linear(6, 30, bias=False)
        self.norm = nn.LayerNorm(8)
        self.table = nn.Embedding(5, 4)


@pytest.fixture
def base():
    torch.manual_seed(0)
    return {name: torch.randn_like(weight) for name, weight in Small().state_dict().items()}


def extracted(base, change, rank, **options):
    student = {name: weight + change.get(name, 0) for name, weight in base.items()}
    skeleton = Small().to("meta")
    return extract_lora(skeleton, student, base.__getitem__, rank=rank, device=torch.device("cpu"), **options)


def product(lora, module):
    down, up = lora.factors[module]
    return up @ down


def test_a_change_of_that_rank_is_found_again(base):
    change = {"wide.weight": torch.randn(8, 3) @ torch.randn(3, 40)}
    change["tall.weight"] = torch.randn(30, 2) @ torch.randn(2, 6)
    lora = extracted(base, change, rank=3)
    assert lora.modules == ["tall", "wide"] and lora.rank == 3 and lora.share_outside == 0
    assert lora.share == pytest.approx(1, abs=1e-6)
    for module in lora.modules:
        torch.testing.assert_close(product(lora, module), change[f"{module}.weight"], atol=1e-5, rtol=1e-5)


def test_the_share_counts_what_is_cut_off_and_what_no_lora_can_hold(base):
    change = {
        "wide.weight": torch.zeros(8, 40),
        "wide.bias": torch.full((8,), 0.5),  # sum of squares: 2
        "norm.weight": torch.tensor([1.0] + [0.0] * 7),
        "table.weight": torch.full((5, 4), 0.5),  # 5
    }
    change["wide.weight"][range(3), range(3)] = torch.tensor([3.0, 2.0, 1.0])  # 9 + 4 + 1
    lora = extracted(base, change, rank=2)
    assert lora.modules == ["wide"]
    assert lora.share == pytest.approx(13 / 22, abs=1e-5)
    assert lora.share_outside == pytest.approx(8 / 22, abs=1e-5)


def test_a_rank_above_a_matrix_is_limited_and_all_modules_have_one_rank(base):
    change = {name: torch.randn_like(base[name]) for name in ("wide.weight", "tall.weight")}
    lora = extracted(base, change, rank=100)
    assert lora.rank == 8 and lora.share == pytest.approx(1, abs=1e-6)
    weights, metadata = lora.export(torch.bfloat16)
    assert {name: tuple(weight.shape) for name, weight in weights.items()} == {
        "tall.lora_A.weight": (8, 6),
        "tall.lora_B.weight": (30, 8),
        "wide.lora_A.weight": (8, 40),
        "wide.lora_B.weight": (8, 8),
    }
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    assert metadata["r"] == metadata["lora_alpha"] == 8 and metadata["target_modules"] == ["tall", "wide"]
    torch.testing.assert_close(product(lora, "tall"), change["tall.weight"], atol=1e-5, rtol=1e-5)


def test_large_matrices_are_decomposed_approximately_and_counted_exactly(monkeypatch):
    torch.manual_seed(1)
    left, right = torch.linalg.qr(torch.randn(200, 120))[0], torch.linalg.qr(torch.randn(150, 120))[0]
    values = torch.linspace(1, 0, 120) ** 3
    matrix = (left * values) @ right.T
    monkeypatch.setattr(extraction, "MAX_EXACT_SIZE", 100)
    before = torch.get_rng_state()
    down, up, squares = extraction.factorized(matrix, 10, torch.device("cpu"))
    assert torch.equal(before, torch.get_rng_state())
    best = values[:10].square().sum().item()
    assert 0.999 * best < squares <= best * (1 + 1e-5)
    left_over = (matrix - up @ down).square().sum().item()
    assert left_over == pytest.approx(values.square().sum().item() - squares, rel=1e-4)


def test_a_device_that_is_too_small_leaves_the_work_to_the_cpu(monkeypatch):
    change, decompose = torch.randn(4, 4), extraction.truncated_svd

    def fail_once(matrix, rank):
        monkeypatch.setattr(extraction, "truncated_svd", decompose)
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(extraction, "truncated_svd", fail_once)
    down, up, _ = extraction.factorized(change, 4, torch.device("cpu"))
    torch.testing.assert_close(up @ down, change)


def test_without_a_changed_matrix_there_is_no_lora(base):
    with pytest.raises(ValueError, match="^training has changed no linear module's matrix$"):
        extracted(base, {"norm.weight": torch.ones(8)}, rank=2)
