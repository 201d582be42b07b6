"""What rollouts start from: contexts and noise, read one micro-batch ahead of their use."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from .contexts import Contexts
from .data.order import Sample, noise_seed, place_seed
from .model import Context, FewStepPipeline
from .prior import PriorPrompts
from .rollout import seeded_noise


@dataclass(frozen=True)
class MicroBatch:
    """One of a process's micro-batches.

    Attributes:
        place: its index in the run.
        samples: all of one size.
        weight: factor of its mean loss among the micro-batches of its step.
        has_prior: whether as many prompts are held by prior preservation.
    """

    place: int
    samples: list[Sample]
    weight: float
    has_prior: bool = False


@dataclass(frozen=True)
class RolloutInputs:
    """What one rollout starts from.

    Attributes:
        size: (height, width) in pixels.
        noise: (B, C, h, w), the state at sigma = 1.
        student: the student's context.
        teacher: the context of the teacher or, for prompts of the prior, of the base model. It may hold all samples
            several times, one after another.
    """

    size: tuple[int, int]
    noise: torch.Tensor
    student: Context
    teacher: Context

    def pin_memory(self) -> "RolloutInputs":
        return self._each(lambda part: part.pin_memory())

    def to(self, device: torch.device) -> "RolloutInputs":
        """On a device. The copy of pinned memory does not wait for the device."""
        return self._each(lambda part: part.to(device, non_blocking=True))

    def _each(self, function: Callable[[Any], Any]) -> "RolloutInputs":
        noise, student = function(self.noise), function(self.student)
        teacher = student if self.teacher is self.student else function(self.teacher)
        return RolloutInputs(self.size, noise, student, teacher)


class InputReader:
    """Reads the inputs of a micro-batch's rollouts while the one before it is trained on.

    A single background thread reads and verifies the cache entries and draws the noise. Without a cache, the encoders
    share the accelerator with training, so each micro-batch is encoded when it is asked for.

    Args:
        contexts: of the training data.
        prior: prompts of prior preservation.
        seed: `--seed`.
        device: the accelerator. Inputs are pinned if it is a CUDA device.
        num_copies, num_prior_copies: how often the teacher's, and the base model's, context holds all samples.
    """

    def __init__(
        self,
        pipeline: FewStepPipeline,
        contexts: Contexts,
        prior: PriorPrompts,
        *,
        seed: int,
        device: torch.device,
        num_copies: int = 1,
        num_prior_copies: int = 1,
    ):
        self.num_copies, self.num_prior_copies = num_copies, num_prior_copies
        self.pipeline, self.prior, self.seed, self.data = pipeline, prior, seed, contexts.data
        self.latents_dtype = pipeline.latents_dtype  # a pipeline may look for it in all of the VAE's modules
        self._is_cached = contexts.cache is not None
        self._contexts = contexts.on(torch.device("cpu")) if self._is_cached else contexts
        self._pins = self._is_cached and device.type == "cuda"
        # The thread starts with the first task. CUDA's current device is the thread's own.
        own_device = (
            {"initializer": torch.cuda.set_device, "initargs": (torch.cuda.current_device(),)} if self._pins else {}
        )
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch", **own_device)
        self._ahead: tuple[MicroBatch, Future] | None = None

    def get(self, batch: MicroBatch, following: MicroBatch | None = None) -> list[RolloutInputs]:
        """The inputs of a micro-batch, see `read`. With a cache, begins to read those of the following one.

        Raises:
            InputError: a cache entry of this micro-batch is missing or damaged, or its encoding is not finite.
        """
        ahead, self._ahead = self._ahead, None
        is_read = ahead is not None and ahead[0] == batch
        inputs = ahead[1].result() if is_read else self.read(batch)
        if self._is_cached and following is not None:
            self._ahead = following, self._pool.submit(self.read, following)
        return inputs

    def read(self, batch: MicroBatch) -> list[RolloutInputs]:
        """The inputs of the rollout on the samples and, if it has one, of that on the prompts of the prior.

        They are on the CPU if they are from the cache.
        """
        size = self.data.bucket(batch.samples[0])
        seeds = [noise_seed(self.seed, sample) for sample in batch.samples]
        contexts = self._contexts.load(batch.samples, num_copies=self.num_copies)
        inputs = [RolloutInputs(size, self._noise(size, seeds), *contexts)]
        if batch.has_prior:
            is_editing, count = self.data.is_editing, len(batch.samples)
            prompts = self.prior.draw(self.seed, batch.place, count, have_one_kind=is_editing)
            cond_images = None
            if is_editing and not self.prior.is_unrelated(prompts[0]):
                cond_images = [self.data.cond_crops(sample) for sample in batch.samples]
            seeds = [place_seed(self.seed, "prior noise", f"{batch.place}/{index}") for index in range(len(prompts))]
            student = base = self._contexts.student(prompts, cond_images)
            if (copies := self.num_prior_copies) > 1:
                base = self._contexts.student(prompts * copies, cond_images and cond_images * copies)
            inputs.append(RolloutInputs(size, self._noise(size, seeds), student, base))
        return [one.pin_memory() for one in inputs] if self._pins else inputs

    def _noise(self, size: tuple[int, int], seeds: list[int]) -> torch.Tensor:
        return seeded_noise(self.pipeline.latent_shape(*size), seeds).to(self.latents_dtype)
