"""The order in which examples are trained on.

Every random choice has its own generator, seeded by `--seed`, its purpose and its place in the run. So each process
can compute any batch by itself, and a resumed run needs no generator state.
"""

import hashlib
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass

from .buckets import Example
from .pictures import Picture


@dataclass(frozen=True)
class Sample:
    """An example as it is used in one epoch.

    Attributes:
        example: index into the examples.
        epoch: the epoch, from 0.
        caption: index into the picture's captions.
        flip: whether the crop is mirrored.
    """

    example: int
    epoch: int
    caption: int
    flip: bool


class SampleOrder:
    """An endless sequence of micro-batches.

    Each epoch contains every example once, in a new order. The examples of a micro-batch have the same bucket, so the
    last one of a bucket may be smaller than the others.

    Args:
        pictures: the pictures, which say how many captions there are to draw from.
        examples: their examples.
        batch_size: largest number of samples in a micro-batch.
        random_flip: whether to mirror half of the samples, chosen at random.
        seed: `--seed`.

    Attributes:
        num_batches: number of micro-batches per epoch.
        mean_batch_size: samples per micro-batch, at most `batch_size`.
        buckets: (height, width) in pixels -> indices of the examples of that size.
    """

    def __init__(
        self, pictures: list[Picture], examples: list[Example], *, batch_size: int, random_flip: bool, seed: int
    ):
        self.batch_size = batch_size
        self.random_flip = random_flip
        self.seed = seed
        self.caption_counts = [len(pictures[example.picture].captions) for example in examples]
        self.buckets: dict[tuple[int, int], list[int]] = {}
        for index, example in enumerate(examples):
            self.buckets.setdefault(example.bucket, []).append(index)
        self.num_batches = sum(math.ceil(len(members) / batch_size) for members in self.buckets.values())
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
        for members in self.buckets.values():
            shuffled = rng.sample(members, len(members))
            batches += [shuffled[i : i + self.batch_size] for i in range(0, len(shuffled), self.batch_size)]
        rng.shuffle(batches)
        return batches

    def _sample(self, epoch: int, example: int) -> Sample:
        place = f"{epoch}/{example}"
        caption = random.Random(f"{self.seed}/caption/{place}").randrange(self.caption_counts[example])
        flip = self.random_flip and random.Random(f"{self.seed}/flip/{place}").random() < 0.5
        return Sample(example, epoch, caption, flip)


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
