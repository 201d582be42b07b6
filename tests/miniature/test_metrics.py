import numpy as np
import pytest
import torch

from benchmarks.miniature import world
from benchmarks.miniature.metrics import detail, effective_poses, frechet_distance, object_residual
from benchmarks.miniature.tasks import standard_tasks


def test_what_is_drawn_is_read(reader):
    task = standard_tasks(48)["text_seen"]
    reading = reader.read(task.real)
    figures = reader.accuracy(reading, task.wanted, task.backgrounds)
    assert set(figures.values()) == {1.0}
    assert detail(task.real, reading) == pytest.approx(1, abs=0.05)
    assert object_residual(task.real, reading) == pytest.approx(1, abs=0.05)
    assert effective_poses(reading) > 0.8 * len(world.POSES)
    other = [task.wanted[-1], *task.wanted[:-1]]
    assert reader.accuracy(reading, other, task.backgrounds)["exact"] < 0.2


def test_figures_show_blur_a_second_object_and_a_single_place(reader):
    rng = np.random.default_rng(0)
    sprite = world.sprite(world.all_appearances()[0])
    same = world.to_tensor([world.draw(sprite, (1, 3), "sky", rng) for _ in range(24)])
    blurred = torch.nn.functional.avg_pool2d(same, 4).repeat_interleave(4, 2).repeat_interleave(4, 3)
    assert effective_poses(reader.read(same)) == pytest.approx(1)
    assert detail(blurred, reader.read(same)) < 0.7
    background, second = world.to_tensor([world.draw(part, (3, 1), "sky") for part in (0 * sprite, sprite)])
    ghosted = same + 0.3 * (second - background)
    assert detail(ghosted, reader.read(same)) == pytest.approx(1, abs=0.15)  # a shadow is not grain
    assert object_residual(ghosted, reader.read(same)) > 1.2
    assert frechet_distance(blurred, same) > 10 * frechet_distance(same[:12], same[12:])
