"""Measures time and memory of a training step, beside a loop of the published shape and flow-matching LoRA.

Weights and encodings are random, so nothing is downloaded. Each case is timed in turn with the published loop, in
alternating order, in one process. `--size thin` takes about six minutes on one CPU core. The other sizes need a GPU:

    python -m benchmarks.step --size klein-4b

prints the card, the versions and a Markdown table, and writes both with all single figures into --output_dir, after
each case.
"""

import argparse
import gc
import itertools
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch

from benchmarks import startup
from benchmarks.miniature.command_line import HelpFormatter, positive_int, run
from benchmarks.miniature.files import make_folder
from benchmarks.published_loop import FlowMatchingLoop, PublishedLoop
from benchmarks.step_encoders import measure_encoders
from benchmarks.step_loops import Passes, TrainingLoop
from benchmarks.step_measure import (
    CpuDevice,
    CudaDevice,
    Device,
    FirstSteps,
    Loop,
    largest_difference,
    measure_pairs,
    ratios,
    resident_bytes,
    start_optimizer,
    take_first_steps,
    unless_out_of_memory,
)
from benchmarks.step_models import SIZES, RandomModel
from benchmarks.step_report import MemoryRow, Results, Row, environment, report
from dopsd.errors import InputError


NUM_STATES = 4
MEMORY_STATES = (2, 4, 8)
CHECKPOINTING = ("--gradient_checkpointing",)
B_STD = 0.02  # A matrices have peft's "gaussian" initialisation


@dataclass(frozen=True)
class Case:
    """One row of the table: a loop with these flags of the training script, which trains on all states by default.

    Attributes:
        measures_passes: whether it is compared with its own passes, too.
    """

    name: str
    flags: tuple[str, ...] = ()
    loop: Callable[[RandomModel, list[str]], Loop] = TrainingLoop
    measures_passes: bool = False

    @property
    def is_checkpointed(self) -> bool:
        return set(CHECKPOINTING) <= set(self.flags)

    @property
    def is_compiled(self) -> bool:
        return "--compile" in self.flags


ALL_STATES = Case("all states", measures_passes=True)
PUBLISHED = Case("published loop", loop=PublishedLoop)
PUBLISHED_CHECKPOINTED = Case("published loop, checkpointed", CHECKPOINTING, PublishedLoop)


def make_cases(attention_backend: str) -> list[Case]:
    """The cases that are compared with the published loop: each switch by itself, and all of them together."""
    one_state = ("--num_trained_states", "1")
    switches = [("--compile",), ("--attention_backend", attention_backend), CHECKPOINTING, one_state]
    return [
        Case("flow-matching LoRA", loop=FlowMatchingLoop),
        ALL_STATES,
        *(Case(f"`{' '.join(switch)}`", switch) for switch in switches),
        Case("all of these flags", tuple(itertools.chain(*switches))),
        Case(
            "the script's defaults, with prior preservation",
            (*one_state, "--with_prior_preservation", "true"),
            measures_passes=True,
        ),
    ]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="thin", help="Model, with sizes of picture and prompt.")
    parser.add_argument("--pairs", type=positive_int, default=2, help="How often each case is timed.")
    parser.add_argument(
        "--attention_backend", help="Value of the script's flag. Default: native; on a GPU, _native_cudnn."
    )
    parser.add_argument(
        "--captions",
        type=positive_int,
        default=20,
        help="Captions whose start-up is measured, on the shipped miniature; with sizes in float32 only.",
    )
    parser.add_argument("--output_dir", type=Path, default=Path("benchmark-output"), help="Folder for the results.")
    return parser.parse_args()


class StepBenchmark:
    """Measures cases on one model.

    Args:
        num_pairs: how often each is timed.

    Raises:
        InputError: no step on all states fits the device.
    """

    def __init__(self, model: RandomModel, device: Device, num_pairs: int):
        self.model, self.device, self.num_pairs = model, device, num_pairs
        self.lora = random_lora(TrainingLoop(model, state_flags(NUM_STATES)).roles.state_dict())
        for case in (ALL_STATES, Case("", CHECKPOINTING)):
            first_steps = unless_out_of_memory(partial(self.first_steps, case))
            model.accelerator.free_memory()
            if first_steps is not None:
                self.reference = first_steps.gradients
                return
        raise InputError("--size: not even a step with gradient checkpointing fits this GPU; choose a smaller model")

    def make(self, case: Case, num_states: int = NUM_STATES, resolution: int | None = None) -> Loop:
        """The case's loop with the same adapters as all others, and with its optimizer's states."""
        flags = [*state_flags(num_states), "--resolution", str(resolution or self.model.size.resolution)]
        loop = case.loop(self.model, [*flags, *case.flags])
        loop.load_state_dict(self.lora)
        start_optimizer(loop)
        return loop

    def first_steps(self, case: Case) -> FirstSteps:
        loop = self.make(case)
        return take_first_steps(self.device, loop, loop.gradient_calls())

    def measure(self, cases: list[Case], keep: Callable[[list[Row]], None] = lambda rows: None) -> list[Row]:
        """One row per case, after those of the published loop without and with checkpointing.

        Compiled cases come last: a kernel that fails on a GPU ends the process.

        Args:
            keep: called with the rows after each case.
        """
        rows = {case.name: Row(case.name, list(case.flags)) for case in (PUBLISHED, PUBLISHED_CHECKPOINTED, *cases)}
        for is_compiled, published in itertools.product((False, True), (PUBLISHED, PUBLISHED_CHECKPOINTED)):
            kind = is_compiled, published.is_checkpointed
            chosen = [case for case in cases if (case.is_compiled, case.is_checkpointed) == kind]
            if is_compiled and not chosen:
                continue
            row = rows[published.name]
            loop = unless_out_of_memory(partial(self.start, row, published))
            for case in chosen:
                torch.compiler.reset()  # compiled variants of other cases count towards the limit of all
                unless_out_of_memory(partial(self.measure_case, rows[case.name], case, row, loop))
                self.model.accelerator.free_memory()
                keep([*rows.values()])
            del loop
            self.model.accelerator.free_memory()
        return list(rows.values())

    def start(self, row: Row, case: Case) -> Loop:
        """Makes the case's loop and fills in what its first steps show."""
        print(f"Measuring: {case.name}", file=sys.stderr, flush=True)
        row.fits = bool(row.fits)
        loop = self.make(case)
        gradient_calls = loop.gradient_calls()
        calls = gradient_calls or [loop] * loop.period
        first = take_first_steps(self.device, loop, calls, is_compiled=case.is_compiled)
        if gradient_calls:
            row.gradient_difference = largest_difference(first.gradients, self.reference)
        row.activation_bytes, row.resident_bytes = first.peak_bytes, resident_bytes(loop)
        row.fits = True
        return loop

    def measure_case(self, row: Row, case: Case, published: Row, published_loop: Loop | None) -> None:
        """Fills in the case's row; adds to the published loop's times those that it was compared with."""
        loop = self.start(row, case)
        loops = {"own": [loop] * loop.period}
        if published_loop is not None:
            loops["published"] = [published_loop]
        if case.measures_passes:
            passes = Passes(loop)
            passes()
            loops["passes"] = [passes] * passes.period
        times = measure_pairs(self.device, loops, self.num_pairs)
        row.times = times["own"]
        row.compiler_failed = isinstance(loop, TrainingLoop) and loop.compiler_failed
        if case.measures_passes:
            row.of_passes = ratios(row.times, times["passes"])
        if published_loop is not None:
            published.times += times["published"]
            row.of_published = ratios(row.times, times["published"])
            if row.activation_bytes is not None:
                row.memory_of_published = row.activation_bytes / published.activation_bytes

    def measure_memory(self) -> list[MemoryRow]:
        """Activation memory of the training step and of the published loop over states and resolutions."""
        smallest, *larger = self.model.size.resolutions
        shapes = [(count, smallest) for count in MEMORY_STATES] + [(NUM_STATES, side) for side in larger]
        rows = []
        for flags in ((), CHECKPOINTING):
            for num_states, resolution in shapes:
                what = f"memory with {num_states} states, {resolution} pixels {' '.join(flags)}"
                print(f"Measuring: {what}", file=sys.stderr, flush=True)
                peaks = []
                for kind in (TrainingLoop, PublishedLoop):
                    peak = partial(self.peak_bytes, Case("", flags, kind), num_states, resolution)
                    peaks.append(unless_out_of_memory(peak))
                    self.model.accelerator.free_memory()
                rows.append(MemoryRow(num_states, resolution, bool(flags), *peaks))
        return rows

    def peak_bytes(self, case: Case, num_states: int, resolution: int) -> int | None:
        return self.device.peak_bytes(self.make(case, num_states, resolution))


def state_flags(num_states: int) -> list[str]:
    """Flags for a rollout of which all states are trained on."""
    return ["--num_rollout_steps", str(num_states), "--num_trained_states", str(num_states)]


def random_lora(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Adapters of which no matrix is zero, so that all gradients count; the teacher differs from the student.

    Args:
        state: what `StudentTeacherLoRA.state_dict` returned: A matrices, (rank, in), and B matrices, (out, rank).
    """
    generator = torch.Generator().manual_seed(0)
    stds = {name: B_STD if ".lora_B." in name else 1 / len(weight) for name, weight in state.items()}
    return {name: torch.randn(weight.shape, generator=generator) * stds[name] for name, weight in state.items()}


def main() -> None:
    args = parse_args()
    size = SIZES[args.size]
    if size.needs_gpu and not torch.cuda.is_available():
        raise InputError(f"--size {args.size}: needs a GPU; choose thin on a CPU")
    if not size.needs_gpu:
        os.environ["ACCELERATE_USE_CPU"] = "true"
        torch.set_num_threads(1)
    gc.freeze()  # each collection of garbage would walk all that the libraries made on import
    make_folder(args.output_dir, flag="--output_dir")
    device = CudaDevice() if size.needs_gpu else CpuDevice()
    backend = args.attention_backend or ("_native_cudnn" if size.needs_gpu else "native")
    started = time.perf_counter()
    results = Results(args.size, environment(), args.pairs, args.captions)
    with tempfile.TemporaryDirectory() as folder:
        model = RandomModel(size, Path(folder))
        results.encoders = measure_encoders(model, device)
        model.make_base()
        benchmark = StepBenchmark(model, device, args.pairs)
        results.memory = benchmark.measure_memory()

        def keep(rows: list[Row]) -> None:
            results.steps, results.seconds = rows, time.perf_counter() - started
            write(results, args.output_dir)

        benchmark.measure(make_cases(backend), keep)
    if size.mixed_precision == "no":  # the miniature's, in the precision that accelerate has been started with
        results.starts, _ = startup.measure(args.captions)
    results.seconds = time.perf_counter() - started
    print(write(results, args.output_dir))


def write(results: Results, folder: Path) -> str:
    """Writes the results as JSON and Markdown. Returns the latter."""
    text = report(results)
    path = folder / f"step-{results.size}"
    path.with_suffix(".json").write_text(json.dumps(asdict(results), indent=2) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(text, encoding="utf-8")
    return text


if __name__ == "__main__":
    run(main)
