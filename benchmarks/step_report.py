"""The results of `benchmarks.step`, and their tables in Markdown."""

import os
import platform
import statistics
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import torch

from benchmarks.miniature.tables import markdown
from benchmarks.step_measure import Seconds


LIBRARIES = ("torch", "diffusers", "peft", "accelerate", "transformers")


@dataclass
class Row:
    """What was measured of a case.

    Attributes:
        flags: of the training script.
        fits: False if the device ran out of memory; None if the case has not been measured.
        times: of one step each, or the mean of several steps.
        of_published, of_passes: busy time relative to the published loop's and to the step's own passes, pair by pair.
        activation_bytes: most bytes that a step allocates; None if that cannot be measured.
        resident_bytes: transformer, adapters and optimizer.
        memory_of_published: activation memory relative to the published loop's.
        gradient_difference: of the mean gradient of all states from that of the training step on all states; see
            `largest_difference`.
        compiler_failed: the times are those of a step that is not compiled.
    """

    name: str
    flags: list[str]
    fits: bool | None = None
    times: list[Seconds] = field(default_factory=list)
    of_published: list[float] = field(default_factory=list)
    of_passes: list[float] = field(default_factory=list)
    activation_bytes: int | None = None
    resident_bytes: int | None = None
    memory_of_published: float | None = None
    gradient_difference: float | None = None
    compiler_failed: bool = False


@dataclass(frozen=True)
class MemoryRow:
    """Activation memory of a step on all states, in bytes; None if it does not fit the device."""

    num_states: int
    resolution: int
    is_checkpointed: bool
    own: int | None
    published: int | None


@dataclass
class Results:
    """What one run of the benchmark has measured so far.

    Attributes:
        environment: the machine and the libraries' versions.
        encoders: seconds by what is encoded.
        starts: seconds by kind of start and stage, from `benchmarks.startup`; None if they were not measured.
        seconds: that the benchmark took.
    """

    size: str
    environment: dict[str, str]
    pairs: int
    captions: int
    encoders: dict[str, float] = field(default_factory=dict)
    steps: list[Row] = field(default_factory=list)
    memory: list[MemoryRow] = field(default_factory=list)
    starts: dict[str, dict[str, float]] | None = None
    seconds: float = 0.0


# Limits for the thin model on a CPU. Time by the name of the case, relative to the published loop's; memory at the
# largest resolution without and with checkpointing, relative to the published loop's; growth of memory from the fewest
# to the most states.
TIME_TARGETS = {"all states": 0.95, "`--compile`": 0.75, "`--num_trained_states 1`": 0.30}
MEMORY_TARGETS = {False: 0.26, True: 0.45}
GROWTH_TARGET = 0.05
STEP_NOTE = """\
Seconds: of CPU time on a CPU, by GPU events on a GPU; the median. Ratios: median (smallest to largest) of the pairs. A
case with checkpointing is compared with the published loop with checkpointing. The published loop's encoders are not
part of its step; their time stands below. Passes: the step's own forward and backward passes and nothing else.
Activations: the most that a step allocates beyond weights, adapters and optimizer; not seen of compiled code on a CPU.
Gradients: largest relative difference of a parameter's mean gradient over all states from the training step's."""


def environment() -> dict[str, str]:
    """The machine, and versions of what decides on speed."""
    found = {"device": cpu_name(), "threads": str(torch.get_num_threads()), "system": platform.platform()}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "device": properties.name,
            "memory": f"{properties.total_memory / 1e9:.1f} GB",
            "CUDA": str(torch.version.cuda),
        }
    return found | {"python": platform.python_version()} | {name: version(name) for name in LIBRARIES}


def cpu_name() -> str:
    """The processor's name where Linux says it."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} CPUs"


def report(results: Results) -> str:
    """The results as a page of Markdown."""
    versions = ", ".join(f"{name} {value}" for name, value in results.environment.items())
    parts = [
        f"# Training step, --size {results.size}",
        f"{versions}. {results.pairs} pairs; the benchmark took {results.seconds / 60:.1f} minutes.",
        step_table(results),
        STEP_NOTE,
        "## Activation memory over states and resolution, in MB",
        memory_table(results),
        "## Encoding, in seconds",
        encoder_table(results),
    ]
    if results.starts is not None:
        parts += [f"## Start-up of the miniature with {results.captions} captions, in seconds", start_table(results)]
    return "\n\n".join(parts) + "\n"


def step_table(results: Results) -> str:
    """One row per case."""
    headings = ["seconds", "of the published loop's", "of its passes", "activations, MB"]
    headings += ["of the published loop's", "all in all, GB", "gradients", "target for time"]
    rows = []
    for row in results.steps:
        if not row.fits:
            result = "not measured" if row.fits is None else "out of memory"
            rows.append([row.name, result, *[""] * 6, time_target(results, row)])
            continue
        rows.append(
            [
                row.name + (" (the compiler failed: not compiled)" if row.compiler_failed else ""),
                f"{statistics.median(one.busy for one in row.times):.3g}" if row.times else "-",
                spread(row.of_published),
                spread(row.of_passes),
                megabytes(row.activation_bytes),
                number(row.memory_of_published),
                "-" if row.activation_bytes is None else f"{total_bytes(row) / 1e9:.3g}",
                "-" if row.gradient_difference is None else f"{row.gradient_difference:.0e}",
                time_target(results, row),
            ]
        )
    return markdown(headings, rows)


def total_bytes(row: Row) -> int:
    return row.resident_bytes + row.activation_bytes


def time_target(results: Results, row: Row) -> str:
    limit = TIME_TARGETS.get(row.name) if results.size == "thin" else None
    return "" if limit is None else judged(statistics.median(row.of_published) if row.of_published else None, limit)


def judged(value: float | None, limit: float) -> str:
    """Whether a target is met."""
    if value is None:
        return f"≤ {limit:.2f}: not measured"
    return f"≤ {limit:.2f}: {'met' if value <= limit else 'not met'}"


def memory_table(results: Results) -> str:
    """One row per number of states and resolution."""
    lines, first = [], {}
    most = max((row.num_states for row in results.memory), default=0)
    largest = max((row.resolution for row in results.memory), default=0)
    for row in results.memory:
        start = first.setdefault((row.resolution, row.is_checkpointed), row)
        name = f"{row.num_states} states, {row.resolution} pixels{', checkpointed' if row.is_checkpointed else ''}"
        ratio = None if row.own is None or row.published is None else row.own / row.published
        growth = None if row is start or row.own is None or start.own is None else row.own / start.own - 1
        target = ""
        if results.size == "thin" and row.resolution == largest:
            target = judged(ratio, MEMORY_TARGETS[row.is_checkpointed])
        if results.size == "thin" and row.num_states == most:
            target = f"growth {judged(growth, GROWTH_TARGET)}"
        cells = [
            megabytes(row.own),
            megabytes(row.published),
            number(ratio),
            "" if growth is None else f"{growth:+.1%}",
        ]
        lines.append([name, *cells, target])
    headings = ["training step", "published loop", "ratio", "growth from the fewest states", "target"]
    return markdown(headings, lines)


def encoder_table(results: Results) -> str:
    seconds = results.encoders
    rows = [[name, f"{value:.3g}"] for name, value in seconds.items()]
    return markdown(
        ["seconds"], [*rows, ["what the published loop adds to each step", f"{sum(seconds.values()):.3g}"]]
    )


def start_table(results: Results) -> str:
    stages = list(next(iter(results.starts.values())))
    rows = [[name, *(f"{seconds[stage]:.2f}" for stage in stages)] for name, seconds in results.starts.items()]
    return markdown(stages, rows)


def spread(values: list[float]) -> str:
    """The median, and the smallest and largest value."""
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})" if values else "-"


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def megabytes(value: int | None) -> str:
    return "-" if value is None else f"{value / 1e6:,.1f}"
