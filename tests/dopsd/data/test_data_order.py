import itertools
from types import SimpleNamespace

import pytest

from data_helpers import some_pictures
from dopsd.data.buckets import Example
from dopsd.data.order import Sample, SampleOrder, micro_batches, noise_seed, place_seed, trained_states
from dopsd.data.pictures import Picture


def two_buckets(captions=("a dog",)):
    """Seven examples of one bucket and four of another, mixed."""
    pictures = some_pictures(11, captions)
    buckets = [(64, 96) if index % 3 == 1 else (64, 64) for index in range(11)]
    return pictures, [Example(index, 0, bucket, (0.5, 0.5)) for index, bucket in enumerate(buckets)]


def make_order(captions=("a dog",), batch_size=3, random_flip=False, seed=0):
    return SampleOrder(*two_buckets(captions), batch_size=batch_size, random_flip=random_flip, seed=seed)


def one_epoch(order, epoch):
    return [order.batch(epoch * order.num_batches + place) for place in range(order.num_batches)]


@pytest.mark.parametrize(("batch_size", "num_batches"), [(1, 11), (2, 6), (3, 5), (4, 3), (100, 2)])
def test_every_example_comes_once_in_an_epoch_in_batches_of_one_bucket(batch_size, num_batches):
    _, examples = two_buckets()
    order = make_order(batch_size=batch_size)
    assert order.num_batches == num_batches
    for epoch in range(4):
        batches = one_epoch(order, epoch)
        assert sorted(sample.example for batch in batches for sample in batch) == list(range(11))
        assert {sample.epoch for batch in batches for sample in batch} == {epoch}
        for batch in batches:
            assert 1 <= len(batch) <= batch_size
            assert len({examples[sample.example].bucket for sample in batch}) == 1


def test_the_mean_batch_size_counts_the_smaller_batches():
    assert make_order(batch_size=1).mean_batch_size == 1
    assert make_order(batch_size=4).mean_batch_size == 11 / 3
    assert make_order(batch_size=100).mean_batch_size == 11 / 2


def test_every_epoch_shuffles_examples_and_batches():
    order = make_order()
    epochs = [one_epoch(order, epoch) for epoch in range(8)]
    orders = {tuple(sample.example for batch in batches for sample in batch) for batches in epochs}
    assert len(orders) == 8
    groupings = {frozenset(frozenset(sample.example for sample in batch) for batch in batches) for batches in epochs}
    assert len(groupings) > 4  # which examples share a batch
    _, examples = two_buckets()
    buckets = {tuple(examples[batch[0].example].bucket for batch in batches) for batches in epochs}
    assert len(buckets) > 2  # order of the buckets


def test_a_batch_is_the_same_from_any_object_in_any_order_of_calls():
    flags = dict(captions=("a", "b", "c"), random_flip=True, seed=5)
    forwards = make_order(**flags)
    expected = [forwards.batch(index) for index in range(40)]
    backwards = make_order(**flags)
    assert [backwards.batch(index) for index in reversed(range(40))] == expected[::-1]
    assert make_order(**flags).batch(33) == expected[33]
    other_seed = make_order(**flags | {"seed": 6})
    assert [other_seed.batch(index) for index in range(40)] != expected


def test_draws_do_not_depend_on_each_other():
    """The order stays when flips or captions are added, so that runs can be compared."""
    plain = [sample.example for batch in one_epoch(make_order(), 0) for sample in batch]
    drawn = make_order(captions=("a", "b"), random_flip=True)
    assert [sample.example for batch in one_epoch(drawn, 0) for sample in batch] == plain


def test_every_caption_is_drawn_over_epochs():
    order = make_order(captions=("a", "b", "c"))
    samples = [sample for epoch in range(40) for batch in one_epoch(order, epoch) for sample in batch]
    for example in range(11):
        assert {sample.caption for sample in samples if sample.example == example} == {0, 1, 2}
    counts = [sum(sample.caption == caption for sample in samples) for caption in range(3)]
    assert sum(counts) == 440 and min(counts) > 110
    assert len({sample.caption for batch in one_epoch(order, 0) for sample in batch}) > 1


def test_captions_are_counted_per_picture():
    pictures = [Picture("a.png", ("x",), None), Picture("b.png", ("x", "y"), None)]
    examples = [Example(index, repeat, (64, 64), (0.5, 0.5)) for index in (1, 0) for repeat in (0, 1)]
    order = SampleOrder(pictures, examples, batch_size=1, random_flip=False, seed=0)
    samples = [order.batch(index)[0] for index in range(200)]
    assert {sample.caption for sample in samples if sample.example in (2, 3)} == {0}
    assert {sample.caption for sample in samples if sample.example in (0, 1)} == {0, 1}


def test_flips():
    samples = [
        sample for epoch in range(40) for batch in one_epoch(make_order(random_flip=True), epoch) for sample in batch
    ]
    assert 170 < sum(sample.flip for sample in samples) < 270  # of 440
    for example in range(11):
        assert {sample.flip for sample in samples if sample.example == example} == {True, False}
    assert not any(sample.flip for epoch in range(5) for batch in one_epoch(make_order(), epoch) for sample in batch)


def test_noise_seed():
    sample = Sample(example=3, epoch=2, caption=0, flip=False)
    assert noise_seed(7, sample) == noise_seed(7, Sample(3, 2, caption=1, flip=True))
    places = [Sample(example, epoch, 0, False) for example in range(30) for epoch in range(30)]
    seeds = {noise_seed(seed, place) for place in places for seed in (0, 1)}
    assert len(seeds) == 1800
    assert all(0 <= seed < 2**63 for seed in seeds) and max(seeds) > 2**62
    assert noise_seed(0, Sample(0, 0, 0, False)) == 3063214539133759720


def test_draws_are_the_same_on_every_machine():
    """Fixed values: a change here changes what a resumed run sees."""
    order = make_order(captions=("a", "b", "c"), random_flip=True)
    assert order.batch(8) == [
        Sample(example=1, epoch=1, caption=0, flip=False),
        Sample(example=4, epoch=1, caption=1, flip=True),
        Sample(example=10, epoch=1, caption=0, flip=True),
    ]


def test_place_seed():
    assert place_seed(0, "noise", "0/0") == noise_seed(0, Sample(0, 0, 0, False))
    seeds = {place_seed(seed, use, place) for seed in (0, 1) for use in ("noise", "dropout") for place in ("0/0", "1")}
    assert len(seeds) == 8


def test_every_sample_of_a_step_counts_the_same_in_any_process():
    sizes = [1, 2, 2, 4, 1, 3]  # of places 6 to 11: step 1 of two processes with three batches each
    order = SimpleNamespace(batch=lambda place: [f"{place}.{i}" for i in range(sizes[place - 6])])
    shares = [
        list(micro_batches(order, 1, accumulation_steps=3, num_processes=2, process_index=process))
        for process in range(2)
    ]
    assert [[place for place, *_ in share] for share in shares] == [[6, 8, 10], [7, 9, 11]]
    for place, samples, weight in itertools.chain(*shares):
        assert samples == order.batch(place)
        # Processes average over themselves and accelerate over the accumulation: each sample ends with 1 / 13.
        assert weight / 6 / len(samples) == pytest.approx(1 / 13)


def test_steps_continue_the_order_without_gaps():
    order = make_order(batch_size=1)
    places = [
        place
        for step in range(3)
        for place, *_ in micro_batches(order, step, accumulation_steps=2, num_processes=1, process_index=0)
    ]
    assert places == list(range(6))
    places = [
        place
        for step in range(3)
        for process in range(2)
        for place, *_ in micro_batches(order, step, accumulation_steps=1, num_processes=2, process_index=process)
    ]
    assert places == list(range(6))


def test_every_state_is_equally_likely_to_be_trained_on():
    draws = [trained_states(0, "states", place, num_states=4, num_trained=2) for place in range(3000)]
    assert all(len({*drawn}) == 2 and drawn == sorted(drawn) for drawn in draws)
    for state in range(4):
        assert sum(state in drawn for drawn in draws) / 3000 == pytest.approx(0.5, abs=0.04)
    assert draws == [trained_states(0, "states", place, num_states=4, num_trained=2) for place in range(3000)]
    assert draws != [trained_states(1, "states", place, num_states=4, num_trained=2) for place in range(3000)]


def test_all_states_are_trained_on_in_order():
    assert trained_states(0, "states", 5, num_states=4, num_trained=4) == [0, 1, 2, 3]
