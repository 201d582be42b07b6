import pytest
import torch

from dopsd.retention import relative_drift


def test_relative_drift():
    base = torch.tensor([[[0.0, 0.0]], [[3.0, 4.0]], [[6.0, 8.0]]])  # distances 5, 5 and 10
    moved = base + torch.tensor([[[3.0, 4.0]], [[0.0, 0.0]], [[0.0, 1.0]]])
    assert relative_drift(base, base) == 0
    assert relative_drift(base, moved) == pytest.approx(2 / (20 / 3))
    assert relative_drift(base.bfloat16(), moved.bfloat16()) == pytest.approx(2 / (20 / 3))


# What is drawn, and when
