"""The other pictures that a teacher sees with `--teacher_picture other`."""

import random
from collections import Counter

import pytest

from data_helpers import some_pictures
from dopsd.data.buckets import Example
from dopsd.data.order import MAX_PARTNERS, SampleOrder, find_partners
from dopsd.data.pictures import Picture
from dopsd.errors import InputError


SQUARE, WIDE = (64, 64), (64, 96)


def pictures_of(groups: str) -> list[Picture]:
    return [Picture(f"{index}.png", ("x",), None, group=group) for index, group in enumerate(groups)]


def digests_of(pictures: list[Picture]) -> list[str]:
    return [picture.name for picture in pictures]


def examples_of(buckets: list[tuple[int, int]], repeats: int = 1) -> list[Example]:
    return [
        Example(index, repeat, bucket, (0.5, 0.5)) for index, bucket in enumerate(buckets) for repeat in range(repeats)
    ]


def test_partners_are_other_pictures_of_the_group_in_the_same_repeat():
    pictures, examples = pictures_of("aababb"), examples_of([SQUARE] * 6, repeats=2)
    partners = find_partners(pictures, examples, digests_of(pictures), have_one_size=False, seed=0)
    for example, found in zip(examples, partners, strict=True):
        others = {examples[partner].picture for partner in found}
        own = pictures[example.picture].group
        expected = {index for index, picture in enumerate(pictures) if picture.group == own} - {example.picture}
        assert others == expected and {examples[partner].repeat for partner in found} == {example.repeat}


def test_their_number_does_not_grow_with_the_group():
    pictures, examples = some_pictures(40, ("x",)), examples_of([SQUARE] * 40)
    partners = find_partners(pictures, examples, digests_of(pictures), have_one_size=False, seed=0)
    assert {len({*found}) for found in partners} == {MAX_PARTNERS}
    assert len({partner for found in partners for partner in found}) > 30
    assert partners == find_partners(pictures, examples, digests_of(pictures), have_one_size=False, seed=0)
    assert partners != find_partners(pictures, examples, digests_of(pictures), have_one_size=False, seed=1)


@pytest.mark.parametrize(
    ("buckets", "expected"),
    [
        ([SQUARE, SQUARE, WIDE, WIDE], [{SQUARE}, {SQUARE}, {WIDE}, {WIDE}]),
        ([SQUARE, SQUARE, SQUARE, WIDE], [{SQUARE}] * 4),
        ([SQUARE, WIDE], [{WIDE}, {SQUARE}]),
    ],
)
def test_partners_of_a_batch_can_be_stacked(buckets, expected):
    examples = examples_of(buckets)
    pictures = pictures_of("a" * len(buckets))
    partners = find_partners(pictures, examples, digests_of(pictures), have_one_size=True, seed=0)
    assert [{examples[partner].bucket for partner in found} for found in partners] == expected
    order = SampleOrder(pictures, examples, batch_size=2, random_flip=False, seed=0, digests=digests_of(pictures))
    for place in range(4 * order.num_batches):
        batch = order.batch(place)
        assert len({examples[sample.example].bucket for sample in batch}) == 1
        assert len({examples[sample.partner].bucket for sample in batch}) == 1


def test_every_partner_is_drawn_and_nothing_else_of_the_order_changes():
    pictures, examples = some_pictures(5, ("x", "y")), examples_of([SQUARE] * 5)
    settings = {"batch_size": 1, "random_flip": True, "seed": 3}
    own = SampleOrder(pictures, examples, **settings)
    other = SampleOrder(pictures, examples, **settings, digests=digests_of(pictures))
    drawn = Counter()
    for place in range(1000):
        (sample,), (expected,) = other.batch(place), own.batch(place)
        assert expected.partner is None and sample.partner != sample.example
        assert (sample.example, sample.epoch, sample.caption, sample.flip) == (
            *(expected.example, expected.epoch, expected.caption, expected.flip),
        )
        drawn[sample.example, sample.partner] += 1
    assert len(drawn) == 5 * 4 and min(drawn.values()) > 20
    variants = [*other.variants(2)]
    assert len(variants) == 2 * 2 * 4 and len({*variants}) == 16  # flips, captions, partners
    assert [*own.variants(2)] == [sample for sample in own.variants(2) if sample.partner is None]


@pytest.mark.parametrize(
    ("groups", "line"),
    [
        ("a", "0.png is the only picture in the group 'a', copies of it not counted"),
        (" b", "0.png is the only picture in the group ' ', copies of it not counted"),
        ("aab", "2.png is the only picture in the group 'b', copies of it not counted"),
    ],
)
def test_a_group_of_one_is_one_line(groups, line):
    pictures = pictures_of(groups)
    with pytest.raises(InputError) as caught:
        find_partners(pictures, examples_of([SQUARE] * len(groups)), digests_of(pictures), have_one_size=False, seed=0)
    advice = "add another picture of the same subject, or drop the flag"
    assert str(caught.value) == f"--teacher_picture other: {line}; {advice}"


def test_a_copy_is_no_other_picture():
    pictures, examples = pictures_of("aaa"), examples_of([SQUARE] * 3)
    partners = find_partners(pictures, examples, ["x", "x", "y"], have_one_size=False, seed=0)
    assert [{*found} for found in partners] == [{2}, {2}, {0, 1}]
    with pytest.raises(InputError, match="0.png is the only picture there, copies of it not counted"):
        find_partners(some_pictures(2, ("x",)), examples[:2], ["x", "x"], have_one_size=False, seed=0)


class Counted(list):
    """Counts how often an item is asked for."""

    num_reads = 0

    def __getitem__(self, index):
        self.num_reads += 1
        return super().__getitem__(index)


@pytest.mark.parametrize("have_one_size", [False, True])
def test_no_picture_of_a_large_group_looks_at_all_others(have_one_size):
    pictures, examples = some_pictures(500, ("x",)), examples_of([SQUARE] * 250 + [WIDE] * 250)
    digests = Counted(digests_of(pictures))
    find_partners(pictures, examples, digests, have_one_size=have_one_size, seed=0)
    assert 500 <= digests.num_reads <= 5 * 500


@pytest.mark.parametrize("seed", range(20))
def test_partners_are_drawn_as_from_a_list_of_the_others(seed):
    rng = random.Random(seed)
    pictures = pictures_of("".join(rng.choices("ab", k=30)))
    digests, examples = rng.choices("uvwxyz", k=30), examples_of([SQUARE] * 30)
    partners = find_partners(pictures, examples, digests, have_one_size=bool(seed % 2), seed=seed)
    for index, picture in enumerate(pictures):
        others = [
            other for other in range(30) if pictures[other].group == picture.group and digests[other] != digests[index]
        ]
        drawn = random.Random(f"{seed}/partners/{index}").sample(others, min(MAX_PARTNERS, len(others)))
        assert partners[index] == tuple(drawn)
