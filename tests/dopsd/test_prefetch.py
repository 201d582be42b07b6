"""Reading ahead changes when inputs are read, and nothing else."""

import threading
from pathlib import Path

import pytest
import torch

from command_line import Command
from dopsd.data.order import Sample
from dopsd.errors import InputError
from dopsd.prefetch import InputReader, MicroBatch
from dopsd.prior import PriorPrompts
from models import EVERY_CONTEXT
from short_runs import context_tensors, one_process, same_tensors
from toy_pipeline import ToyContext
from toy_training import ToyContexts, ToyTraining, make_step, sample


PRIOR = PriorPrompts(unrelated=("a house", "a tree"), other_words=("a kebi dog",))
MAIN = threading.main_thread().name


class CachedContexts(ToyContexts):
    """As if they came from a cache. Records which examples were read in which thread."""

    cache = "a cache"

    def __init__(self, batches: list[list[Sample]], damaged: int | None = None, **sizes):
        super().__init__(batches, **sizes)
        self.damaged, self.reads = damaged, []

    def on(self, device: torch.device) -> "CachedContexts":
        assert device == torch.device("cpu")
        return self

    def load(self, samples: list[Sample], *, num_copies: int = 1) -> tuple[ToyContext, ToyContext]:
        examples = [sample.example for sample in samples]
        self.reads.append((threading.current_thread().name, examples))
        if self.damaged in examples:
            raise InputError(f"{self.damaged}: this cached encoding is missing or damaged")
        return super().load(samples)


BATCHES = [[sample(0)], [sample(1), sample(2)], [sample(3)], [sample(4), sample(5)], [sample(6)]]


def reader_of(contexts: ToyContexts, device: str = "cpu") -> InputReader:
    return InputReader(ToyTraining().pipeline, contexts, PRIOR, seed=0, device=torch.device(device))


def tensors(inputs: list) -> list[torch.Tensor]:
    contexts = [context for one in inputs for context in (one.student, one.teacher) if context is not None]
    read = [tensor for context in contexts for tensor in context_tensors(context) if tensor is not None]
    return [one.noise for one in inputs] + read


def test_the_following_micro_batch_is_read_in_the_background_and_once():
    contexts = CachedContexts(BATCHES)
    reader = reader_of(contexts)
    batches = [MicroBatch(place, samples, 1.0, has_prior=place != 1) for place, samples in enumerate(BATCHES[:3])]
    read = [reader.get(batch, following) for batch, following in zip(batches, [*batches[1:], None], strict=True)]
    assert contexts.reads == [(MAIN, [0]), ("prefetch_0", [1, 2]), ("prefetch_0", [3])]
    assert [len(inputs) for inputs in read] == [2, 1, 2]
    for batch, inputs in zip(batches, read, strict=True):
        assert same_tensors(tensors(inputs), tensors(reader_of(ToyContexts(BATCHES)).read(batch)))
        assert inputs[0].noise.shape[0] == len(batch.samples) and inputs[0].teacher is not None


@pytest.mark.parametrize("accumulation_steps", [1, 2])
def test_training_reads_one_micro_batch_ahead_up_to_the_last_step(accumulation_steps):
    contexts = CachedContexts(BATCHES)
    step = make_step(ToyTraining(), contexts, accumulation_steps, max_train_steps=4)
    seen = []
    step.student.register_forward_hook(lambda module, inputs, output: seen.append(len(contexts.reads)))
    for number in range(1, 4):  # a resumed run
        first = len(seen)
        step(number)
        assert max(seen[first:]) <= number * accumulation_steps + 1
    order = [[one.example for one in BATCHES[place % 5]] for place in range(4 * accumulation_steps)]
    assert [examples for _, examples in contexts.reads] == order[accumulation_steps:]
    assert [thread for thread, _ in contexts.reads].count(MAIN) == 1


def test_training_is_the_same_with_and_without_reading_ahead():
    ahead, direct = ToyTraining(dropout=0.5), ToyTraining(dropout=0.5)
    for training, contexts in ((ahead, CachedContexts(BATCHES)), (direct, ToyContexts(BATCHES))):
        flags = {"lora_dropout": 0.5, "prior_every": 2, "num_trained_states": 2, "max_train_steps": 4}
        step = make_step(training, contexts, 2, PRIOR, **flags)
        training.metrics = [step(number) for number in range(4)]
    for one, other in zip(ahead.metrics, direct.metrics, strict=True):
        assert all(one[name] == other[name] for name in one.keys() - {"seconds_per_step", "peak_memory_gb"})
    assert same_tensors(ahead.roles.student_parameters, direct.roles.student_parameters)
    assert "prior_loss" in ahead.metrics[2] and ahead.metrics[0]["loss"] > 0


def test_without_a_cache_each_micro_batch_is_encoded_by_the_thread_that_trains():
    contexts = CachedContexts(BATCHES)
    contexts.cache = None
    step = make_step(ToyTraining(), contexts, 1, max_train_steps=3)
    for number in range(3):
        step(number)
        assert contexts.reads == [(MAIN, [one.example for one in samples]) for samples in BATCHES[: number + 1]]


def test_a_damaged_entry_ends_the_step_that_needs_it():
    step = make_step(ToyTraining(), CachedContexts(BATCHES, damaged=3), 1)
    step(0), step(1)
    with pytest.raises(InputError, match="^3: this cached encoding is missing or damaged"):
        step(2)


def test_tensors_for_a_gpu_are_pinned_and_copied_without_waiting(monkeypatch):
    copies = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor + 100)
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, *_, **options: copies.append(options) or tensor)
    batch = MicroBatch(0, [sample(1)], 1.0, has_prior=True)
    plain, pinned = (reader_of(CachedContexts(BATCHES), device).read(batch) for device in ("cpu", "cuda"))
    assert same_tensors(tensors(pinned), [tensor + 100 for tensor in tensors(plain)])
    copies.clear()
    moved = [one.to(torch.device("cuda")) for one in pinned]
    assert same_tensors(tensors(moved), tensors(pinned)) and moved[0].size == pinned[0].size
    num_shared = sum(one.teacher is one.student for one in pinned)  # the prior's contexts, which are copied once
    assert num_shared == 1 and copies == [{"non_blocking": True}] * (len(tensors(pinned)) - num_shared)


def test_the_reading_thread_uses_the_gpu_that_trains(monkeypatch):
    """accelerate's device has no number if there is one process, and torch sets a numbered device only."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    reader = reader_of(CachedContexts(BATCHES), "cuda")
    first, second = (MicroBatch(place, BATCHES[place], 1.0) for place in range(2))
    reader.get(first, second)
    reader.get(second)
    assert chosen == [3]


def test_a_schedule_is_made_once_per_size(monkeypatch):
    training, sizes = ToyTraining(), {1: (32, 32), 2: (32, 32)}
    step = make_step(training, ToyContexts(BATCHES, sizes), 2, PRIOR, num_rollout_steps=3, max_train_steps=4)
    calls, make = [], training.pipeline.scheduler.set_timesteps
    monkeypatch.setattr(
        training.pipeline.scheduler, "set_timesteps", lambda *args, **options: calls.append(args) or make(*args)
    )
    for number in range(4):
        step(number)
    assert calls == [(3,), (3,)]
    # Drawing with another number of steps in between changes nothing.
    before = step.schedule(32, 32)
    training.pipeline.schedule(32, 32, 8)
    assert step.schedule(32, 32) is before and len(before) == 3


@EVERY_CONTEXT
def test_inputs_from_a_real_cache_are_those_of_the_encoders(prepare, tmp_path, monkeypatch):
    run, fresh = prepare(random_flip=True), prepare(random_flip=True).encode_without_cache()
    run.fill_cache(tmp_path / "cache", one_process())
    cached, encoding = (
        InputReader(one.pipeline, one.contexts, PriorPrompts(), seed=0, device=torch.device("cpu"))
        for one in (run, fresh)
    )
    batches = [MicroBatch(place, [Sample(place, 0, 0, flip=place == 1)], 1.0) for place in range(3)]
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor + 100)
    for batch, following in zip(batches, [*batches[1:], None], strict=True):
        inputs = cached.get(batch, following)
        assert same_tensors(tensors(inputs), tensors(encoding.get(batch, following)))
        assert same_tensors(
            tensors([one.pin_memory() for one in inputs]), [tensor + 100 for tensor in tensors(inputs)]
        )


ENDING = """
import sys, time
sys.path.insert(0, {folder!r})
from dopsd.errors import TrainingDiverged
from dopsd.prefetch import MicroBatch
from dopsd.terminal import ending_in_one_line
from test_prefetch import BATCHES, CachedContexts, reader_of

class SlowContexts(CachedContexts):
    def load(self, samples, *, num_copies=1):
        if samples == BATCHES[1]:
            time.sleep(0.5)
        return super().load(samples)

with ending_in_one_line(__file__):
    reader = reader_of(SlowContexts(BATCHES, damaged=1))
    reader.get(*(MicroBatch(place, BATCHES[place], 1.0) for place in (0, 1)))
    raise {error}
"""


@pytest.mark.parametrize(
    ("error", "code", "log"),
    [
        ("TrainingDiverged('the loss is nan')", 1, "ending.py: error: the loss is nan"),
        ("KeyboardInterrupt", 1, "ending.py: interrupted; finished encodings are kept in the context cache"),
        ("SystemExit(143)", 143, ""),
    ],
)
def test_a_run_that_ends_while_something_is_read_prints_nothing_about_it(forkserver, tmp_path, error, code, log):
    script = tmp_path / "ending.py"
    script.write_text(ENDING.format(folder=str(Path(__file__).parent), error=error))
    result = Command(forkserver, script)()
    assert (result.code, result.log.strip()) == (code, log)
