import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from dopsd.planner.allocations import CUDA_GRANULARITY, AllocationTracker, storage_bytes


@pytest.fixture(params=["cpu", "meta", "fake"])
def place(request):
    """Makes a tensor of 32-bit numbers."""
    if request.param != "fake":
        yield lambda *shape: torch.ones(*shape, device=request.param)
        return
    with FakeTensorMode():
        yield torch.ones


def test_live_and_peak_bytes(place):
    outside = place(100)
    with AllocationTracker() as tracker:
        first = outside + 1
        second = first * 2
        del first
        assert (tracker.live, tracker.peak) == (400, 800)
        third = torch.cat([second, second])
        assert (tracker.live, tracker.peak) == (1200, 1200)
        del second, third
    assert (tracker.live, tracker.peak) == (0, 1200)


def test_views_and_results_in_place_count_once(place):
    outside = place(10, 10)
    with AllocationTracker() as tracker:
        outside.t()[2:].add_(1)
        assert tracker.peak == 0
        own = outside + 1
        view = own.view(-1)[5:]
        del own
        assert tracker.live == 400
        view.mul_(2)
        del view
    assert (tracker.live, tracker.peak) == (0, 400)


def test_saved_activations_live_until_the_backward_pass(place):
    weight = place(8, 8).requires_grad_()
    with AllocationTracker() as tracker:
        hidden = (place(4, 8) @ weight).exp()
        hidden.sum().backward()
        assert tracker.peak > tracker.live
        del hidden
    assert tracker.live == storage_bytes([weight.grad]) == 256


def test_each_storage_is_rounded_up():
    with AllocationTracker(CUDA_GRANULARITY) as tracker:
        kept = [torch.ones(1), torch.ones(129)]
    assert tracker.live == 512 + 1024
    tracker.reset_peak()
    del kept
    assert (tracker.live, tracker.peak) == (0, 1536)


def test_a_tensor_is_not_taken_for_a_freed_one():
    with AllocationTracker() as tracker:
        for _ in range(5):
            tensor = torch.ones(100)
            assert tracker.live == 400
            del tensor
    assert (tracker.live, tracker.peak) == (0, 400)
