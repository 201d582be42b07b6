"""The order in which examples are trained on.

Every random choice has its own generator, seeded by `--seed`, its purpose and its place in the run. So each process
can compute any batch by itself, and a resumed run needs no generator state.
"""

import hashlib
import itertools
import math
import random
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ..errors import InputError
from .buckets import Example
from .pictures import Picture


# A teacher that reads picture and caption together needs an encoding for each pair of them; this bounds the cache.
MAX_PARTNERS = 4


@dataclass(frozen=True, slots=True)
class Sample:
    """An example as it is used in one epoch.

    Attributes:
        example: index into the examples.
        epoch: the epoch, from 0.
        caption: index into the picture's captions.
        flip: whether the crop is mirrored.
        partner: the example whose picture the teacher sees; None for the sample's own.
    """

    example: int
    epoch: int
    caption: int
    flip: bool
    partner: int | None = None


class BatchShape(NamedTuple):
    """What the examples of a micro-batch have in common. Sizes are (height, width) in pixels.

    Attributes:
        bucket: of the training pictures.
        cond_sizes: of the pictures to edit.
        partner_bucket: of the pictures that the teacher sees instead; None if it sees the training pictures.
    """

    bucket: tuple[int, int]
    cond_sizes: tuple[tuple[int, int], ...] = ()
    partner_bucket: tuple[int, int] | None = None


class SampleOrder:
    """An endless sequence of micro-batches.

    Each epoch contains every example once, in a new order. The examples of a micro-batch have the same shape, so the
    last one of a shape may be smaller than the others.

    Args:
        pictures: the pictures, which say how many captions there are to draw from.
        examples: their examples.
        batch_size: largest number of samples in a micro-batch.
        random_flip: whether to mirror half of the samples, chosen at random.
        seed: `--seed`.
        digests: of the pictures, if the teacher sees another picture of the same group, see `find_partners`.

    Attributes:
        num_batches: number of micro-batches per epoch.
        mean_batch_size: samples per micro-batch, at most `batch_size`.
        members: shape -> indices of the examples of that shape.
        partners: for each example, the examples whose pictures its teacher may see instead; empty if it sees its own.
    """

    def __init__(
        self,
        pictures: list[Picture],
        examples: list[Example],
        *,
        batch_size: int,
        random_flip: bool,
        seed: int,
        digests: Sequence[str] | None = None,
    ):
        self.batch_size = batch_size
        self.random_flip = random_flip
        self.seed = seed
        self.caption_counts = [len(pictures[example.picture].captions) for example in examples]
        self.partners: list[tuple[int, ...]] = [()] * len(examples)
        if digests is not None:
            self.partners = find_partners(pictures, examples, digests, have_one_size=batch_size > 1, seed=seed)
        self.members: dict[BatchShape, list[int]] = {}
        for index, example in enumerate(examples):
            sizes = {examples[partner].bucket for partner in self.partners[index]}
            partner_bucket = sizes.pop() if len(sizes) == 1 else None
            shape = BatchShape(example.bucket, tuple(one.size for one in example.cond_framings), partner_bucket)
            self.members.setdefault(shape, []).append(index)
        self.num_batches = sum(math.ceil(len(members) / batch_size) for members in self.members.values())
        self.mean_batch_size = len(examples) / self.num_batches
        # Batches of the most recently requested epoch.
        self._epoch = -1
        self._batches: list[list[int]] = []

    def batch(self, index: int) -> list[Sample]:
        """Micro-batch number `index` of the run, from 0. It belongs to epoch `index // num_batches`."""
        epoch, place = divmod(index, self.num_batches)
        if epoch != self._epoch:
            self._epoch, self._batches = epoch, self._shuffled_batches(epoch)
        return [self._sample(epoch, example) for example in self._batches[place]]

    def _shuffled_batches(self, epoch: int) -> list[list[int]]:
        rng = random.Random(f"{self.seed}/order/{epoch}")
        batches = []
        for members in self.members.values():
            shuffled = rng.sample(members, len(members))
            batches += [shuffled[i : i + self.batch_size] for i in range(0, len(shuffled), self.batch_size)]
        rng.shuffle(batches)
        return batches

    def _sample(self, epoch: int, example: int) -> Sample:
        place = f"{epoch}/{example}"
        caption = random.Random(f"{self.seed}/caption/{place}").randrange(self.caption_counts[example])
        flip = self.random_flip and random.Random(f"{self.seed}/flip/{place}").random() < 0.5
        partners, partner = self.partners[example], None
        if partners:
            partner = random.Random(f"{self.seed}/teacher's picture/{place}").choice(partners)
        return Sample(example, epoch, caption, flip, partner)

    def variants(self, example: int) -> Iterator[Sample]:
        """Every sample that an example may become, as of epoch 0."""
        flips = (False, True) if self.random_flip else (False,)
        captions = range(self.caption_counts[example])
        for flip, caption, partner in itertools.product(flips, captions, self.partners[example] or (None,)):
            yield Sample(example, 0, caption, flip, partner)

    def num_alike(self, example: int) -> int:
        """How many examples have the same shape."""
        return next(len(members) for members in self.members.values() if example in members)


def find_partners(
    pictures: Sequence[Picture],
    examples: Sequence[Example],
    digests: Sequence[str],
    *,
    have_one_size: bool,
    seed: int,
) -> list[tuple[int, ...]]:
    """For each example, examples of at most `MAX_PARTNERS` other pictures of its group, drawn by the seed.

    Args:
        digests: of the pictures. A copy of a picture is no other picture.
        have_one_size: whether all partners of an example have the same bucket, so that the teacher's pictures can be
            stacked: the example's own if another picture has it, else the most frequent one.

    Raises:
        InputError: a picture is the only one of its group.
    """
    examples_of: dict[int, list[int]] = {}
    for index, example in enumerate(examples):
        examples_of.setdefault(example.picture, []).append(index)
    # A group may hold all pictures, so that none of them may look at all others.
    groups: dict[str, list[int]] = {}
    alike: dict[tuple[str, tuple[int, int]], list[int]] = {}  # of a group and a bucket
    copies: dict[tuple[str, str], list[int]] = {}  # of a group and a digest
    for index, picture in enumerate(pictures):
        groups.setdefault(picture.group, []).append(index)
        copies.setdefault((picture.group, digests[index]), []).append(index)
        if index in examples_of:
            alike.setdefault((picture.group, examples[examples_of[index][0]].bucket), []).append(index)
    partners = []
    for index, example in enumerate(examples):
        picture = pictures[example.picture]
        own = copies[picture.group, digests[example.picture]]
        others = Without(groups[picture.group], own)
        if not len(others):
            group = f"in the group {picture.group!r}" if picture.group else "there"
            raise InputError(
                f"--teacher_picture other: {picture.name} is the only picture {group}, copies of it not counted; add "
                "another picture of the same subject, or drop the flag"
            )
        if have_one_size:
            others = Without(alike[picture.group, example.bucket], own)
            if not len(others):
                rest = Without(groups[picture.group], own)
                count_of = Counter(examples[examples_of[other][0]].bucket for other in rest)
                others = Without(alike[picture.group, count_of.most_common(1)[0][0]], own)
        rng = random.Random(f"{seed}/partners/{index}")
        drawn = rng.sample(others, min(MAX_PARTNERS, len(others)))
        partners.append(tuple(examples_of[other][example.repeat] for other in drawn))
    return partners


class Without(Sequence[int]):
    """A sorted sequence without some of its numbers, which is not copied.

    Args:
        numbers: sorted, without duplicates.
        left_out: likewise, and short. Those that are not among the numbers do not matter.
    """

    def __init__(self, numbers: Sequence[int], left_out: Sequence[int]):
        self.numbers = numbers
        places = ((bisect_left(numbers, number), number) for number in left_out)
        self.left_out = [place for place, number in places if place < len(numbers) and numbers[place] == number]

    def __len__(self) -> int:
        return len(self.numbers) - len(self.left_out)

    def __getitem__(self, index: int) -> int:
        if not 0 <= index < len(self):
            raise IndexError(index)
        for place in self.left_out:
            index += place <= index
        return self.numbers[index]


def micro_batches(
    order: SampleOrder, step: int, *, accumulation_steps: int, num_processes: int, process_index: int
) -> Iterator[tuple[int, list[Sample], float]]:
    """Yields one process's share of an optimizer step.

    A step takes the next `num_processes * accumulation_steps` micro-batches of the order; processes take turns.

    Args:
        order: the order of all micro-batches.
        step: the optimizer step, from 0.
        accumulation_steps: micro-batches per step and process.
        num_processes: number of processes.
        process_index: this process, from 0.

    Yields:
        (place, samples, weight): the micro-batch's index in the run, its samples, and the factor of its mean loss.
        Weights average to 1 over the step and are proportional to the number of samples, so that every sample counts
        the same even if micro-batches differ in size.
    """
    per_step = num_processes * accumulation_steps
    places = range(step * per_step, (step + 1) * per_step)
    batches = [order.batch(place) for place in places]
    mean_size = sum(map(len, batches)) / per_step
    for offset in range(process_index, per_step, num_processes):
        yield places[offset], batches[offset], len(batches[offset]) / mean_size


def place_seed(seed: int, purpose: str, place: str) -> int:
    """Seed for a random generator with one purpose, at one place in the run. It is below 2**63."""
    digest = hashlib.sha256(f"{seed}/{purpose}/{place}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def noise_seed(seed: int, sample: Sample) -> int:
    """Seed for a sample's noise, whatever the process and batch size. See `place_seed`."""
    return place_seed(seed, "noise", f"{sample.epoch}/{sample.example}")


def trained_states(seed: int, purpose: str, place: int, *, num_states: int, num_trained: int) -> list[int]:
    """The states of one micro-batch's rollout that are trained on, in order. Every state is equally likely.

    Args:
        place: the micro-batch's index in the run.
    """
    return sorted(random.Random(f"{seed}/{purpose}/{place}").sample(range(num_states), num_trained))
