"""Figures of comparisons, computed by hand."""

import math

import pytest
import torch

from dopsd.evaluation import figures
from dopsd.evaluation.comparison import Figure


# Unit vectors at these angles in degrees; the cosine of two is that of their difference. Lengths must not count.
def at(*angles: float, length: float = 3.0) -> torch.Tensor:
    radians = torch.tensor(angles) * math.pi / 180
    return length * torch.stack([radians.cos(), radians.sin()], -1)


def cos(degrees: float) -> float:
    return math.cos(math.radians(degrees))


DRAWN = torch.stack([at(0, 60), at(90, 90)])  # 2 prompts, 2 seeds
TRAINING = at(0, 60, length=0.5)


def test_likeness_is_the_mean_and_closeness_the_highest_cosine():
    expected = torch.tensor([[0.75, 0.75], [cos(30) / 2, cos(30) / 2]])
    torch.testing.assert_close(figures.likeness(DRAWN, TRAINING), expected)
    torch.testing.assert_close(figures.closeness(DRAWN, TRAINING), torch.tensor([[1, 1], [cos(30), cos(30)]]))


def test_training_pictures_among_themselves_leave_each_one_out():
    mean, nearest = figures.among_themselves(at(0, 60, 90))
    torch.testing.assert_close(mean, torch.tensor([cos(60) / 2, (cos(60) + cos(30)) / 2, cos(30) / 2]))
    torch.testing.assert_close(nearest, torch.tensor([cos(60), cos(30), cos(30)]))


def test_differences_are_from_the_nearest_picture_whatever_the_number_of_pixels():
    drawn = torch.tensor([[[0.0, 0, 0, 0], [1, 1, 1, 1]]])
    training = torch.tensor([[0.2, 0.2, 0.2, 0.2], [-1, -1, -1, -1]])
    torch.testing.assert_close(figures.nearest_difference(drawn, training), torch.tensor([[0.2, 0.8]]))


@pytest.mark.parametrize(
    ("training", "limit"),
    [([0.0], 0.15), ([0.0, 0.8], 0.15), ([0.0, 0.1], 0.05), ([0.0, 0.01, 0.5, 0.6, 1.0], 0.05)],
)
def test_a_copy_is_nearer_than_training_pictures_are_to_each_other(training, limit):
    assert figures.copy_limit(torch.tensor(training)[:, None].expand(-1, 4)) == pytest.approx(limit)


def test_texts_belong_to_the_prompts():
    torch.testing.assert_close(
        figures.cosine_by_prompt(DRAWN, at(0, 30)), torch.tensor([[1, 0.5], [cos(60), cos(60)]])
    )


def test_retention_compares_the_same_prompt_and_seed():
    base = torch.stack([at(0, 0), at(0, 90)])
    torch.testing.assert_close(figures.retention(DRAWN, base), torch.tensor([[1, 0.5], [0.0, 1]]))


def test_diversity_is_between_seeds_of_one_prompt():
    three = torch.stack([at(0, 60, 90), at(10, 10, 10)])
    expected = 1 - torch.tensor([[cos(60) / 2, (cos(60) + cos(30)) / 2, cos(30) / 2], [1, 1, 1]])
    torch.testing.assert_close(figures.diversity(three), expected)


def test_relative_to_the_bases_prompt():
    values, base = torch.tensor([[1.0, 3], [1, 1]]), torch.tensor([[1.0, 3], [0, 0]])
    found = figures.relative_to_base(values, base)
    torch.testing.assert_close(found[0], torch.tensor([0.5, 1.5]))
    assert found[1].isnan().all()


def test_a_summary_has_the_spread_of_prompts_and_of_seeds():
    figure = figures.summary(torch.tensor([[1.0, 3.0], [3.0, 5.0]]))
    assert figure == Figure(3.0, pytest.approx(math.sqrt(2)), pytest.approx(math.sqrt(2)), 4)
    assert figures.summary(torch.tensor([[1.0, 2.0]])) == Figure(1.5, None, pytest.approx(math.sqrt(0.5)), 2)
    assert figures.summary(torch.tensor([[1.0]])) == Figure(1.0, None, None, 1)


def test_what_cannot_be_measured_is_left_out():
    nan = math.nan
    assert figures.summary(torch.tensor([[1.0, nan], [nan, nan], [2.0, 3.0]])) == Figure(
        2.0, pytest.approx(1.5 / math.sqrt(2)), pytest.approx(1.5 / math.sqrt(2)), 3
    )
    assert figures.summary(torch.tensor([[nan]])) is None
