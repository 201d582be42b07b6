"""`benchmarks.step` on tiny models: the whole command, and what it does where this machine has no GPU."""

import json
import sys
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState

from benchmarks import step
from benchmarks.miniature.command_line import run
from benchmarks.step_measure import CpuDevice, CudaDevice, Seconds, measure_pairs, unless_out_of_memory
from benchmarks.step_models import SIZES, RandomModel
from benchmarks.step_report import TIME_TARGETS, MemoryRow, Results, Row, report


MAX_DIFFERENCE = 1e-5  # of gradients in float32, relative


@pytest.fixture
def own_accelerator(monkeypatch):
    """The benchmark starts accelerate with its own precision."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    AcceleratorState._reset_state()
    yield
    AcceleratorState._reset_state()


@pytest.fixture
def without_compiler(monkeypatch):
    """Compiling takes a minute; `--compile` then runs what it would compile."""
    monkeypatch.setattr("torch.compile", lambda function, **options: function)


@pytest.fixture
def tiny_model(own_accelerator, tmp_path) -> RandomModel:
    model = RandomModel(SIZES["tiny-klein"], tmp_path)
    model.make_base()
    return model


def run_benchmark(monkeypatch, folder: Path, *arguments: str) -> dict:
    """What the command writes as JSON."""
    options = ["--pairs", "1", "--captions", "6", "--output_dir", str(folder)]
    monkeypatch.setattr(sys, "argv", ["step", *options, *arguments])
    step.main()
    (path,) = folder.glob("*.json")
    return json.loads(path.read_text())


def test_the_command_measures_all_cases_and_writes_json_and_markdown(
    own_accelerator, without_compiler, monkeypatch, tmp_path, capsys
):
    results = run_benchmark(monkeypatch, tmp_path / "out", "--size", "tiny-klein")
    assert results.keys() == {field.name for field in fields(Results)}
    assert results["environment"].keys() >= {"device", "threads", "python", "torch", "diffusers", "peft"}
    assert results["encoders"].keys() == {"student's prompt", "teacher's prompt", "picture"}
    assert len(results["starts"]) == 4 and results["starts"]["6 pictures, full cache"]["total"] > 0
    rows = {row["name"]: row for row in results["steps"]}
    assert len(rows) > 7 and all(row["fits"] and row["resident_bytes"] > 0 for row in rows.values())

    of_published = {name: row["of_published"] for name, row in rows.items()}
    assert all(len(ratios) == (0 if name.startswith("published") else 1) for name, ratios in of_published.items())
    assert all(one["wall"] > 0 and one["busy"] > 0 for row in rows.values() for one in row["times"])
    assert len(rows["all states"]["of_passes"]) == 1
    for name, row in rows.items():
        same_loss = name != "flow-matching LoRA" and "--with_prior_preservation" not in row["flags"]
        assert (row["gradient_difference"] is not None) == same_loss
        assert not same_loss or row["gradient_difference"] < MAX_DIFFERENCE, name
        assert (row["activation_bytes"] is None) == ("--compile" in row["flags"])

    # The published loop keeps the graphs of all states, ours that of one.
    memory = {(row["num_states"], row["is_checkpointed"]): row for row in results["memory"]}
    assert set(memory) == {(count, flag) for count in (2, 4, 8) for flag in (False, True)}
    assert memory[8, False]["own"] < 1.05 * memory[2, False]["own"]
    assert memory[8, False]["published"] > 3 * memory[2, False]["published"]
    assert memory[8, True]["published"] < memory[8, False]["published"]

    page = (tmp_path / "out" / "step-tiny-klein.md").read_text()
    assert page == capsys.readouterr().out.removesuffix("\n")
    assert all(f"\n| {name} |" in page for name in rows)


def test_what_was_measured_is_kept_when_a_compiled_case_ends_the_command(own_accelerator, monkeypatch, tmp_path):
    """As a failed kernel does on a GPU."""
    measure_case = step.StepBenchmark.measure_case

    def failing(self, row, case, *arguments):
        if case.is_compiled:
            raise RuntimeError("illegal memory access")
        measure_case(self, row, case, *arguments)

    monkeypatch.setattr(step.StepBenchmark, "measure_case", failing)
    monkeypatch.setattr(step.StepBenchmark, "measure_memory", lambda self: [])
    with pytest.raises(RuntimeError, match="illegal memory access"):
        run_benchmark(monkeypatch, tmp_path, "--size", "tiny-klein")
    rows = {row["name"]: row for row in json.loads((tmp_path / "step-tiny-klein.json").read_text())["steps"]}
    assert {name for name, row in rows.items() if row["fits"] is None} == {"`--compile`", "all of these flags"}
    page = (tmp_path / "step-tiny-klein.md").read_text()
    assert page.count("| not measured |") == 2 and "| all states |" in page


@pytest.mark.exhaustive
def test_the_other_model_runs_in_bfloat16(own_accelerator, without_compiler, monkeypatch, tmp_path):
    results = run_benchmark(monkeypatch, tmp_path, "--size", "tiny-z-image")
    rows = {row["name"]: row for row in results["steps"]}
    assert results["starts"] is None and "picture" not in results["encoders"]
    # Our switches change nothing but rounding; the published loop's adapters are bfloat16.
    assert rows["`--num_trained_states 1`"]["gradient_difference"] < 0.02
    assert 0 < rows["published loop"]["gradient_difference"] < 0.2


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_model_that_needs_a_gpu_is_refused_in_one_line(monkeypatch, tmp_path):
    folder = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["step", "--size", "klein-4b", "--output_dir", str(folder)])
    with pytest.raises(SystemExit, match="^--size klein-4b: needs a GPU; choose thin on a CPU$"):
        run(step.main)
    assert not folder.exists()


class SmallDevice(CpuDevice):
    """Has no memory for the first `num_failures` measurements of memory after the first one."""

    def __init__(self, num_failures: int):
        self.calls_that_fail = set(range(1, num_failures + 1))
        self.num_calls = 0

    def peak_bytes(self, call, *, is_compiled=False):
        self.num_calls += 1
        if self.num_calls - 1 in self.calls_that_fail:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().peak_bytes(call, is_compiled=is_compiled)


def test_a_published_loop_that_does_not_fit_leaves_the_other_times(tiny_model):
    benchmark = step.StepBenchmark(tiny_model, SmallDevice(1), 1)
    published, checkpointed, own = benchmark.measure([step.ALL_STATES])
    assert not published.fits and checkpointed.fits and own.fits
    assert len(own.times) == 1 and own.of_published == [] and own.memory_of_published is None
    assert own.gradient_difference == 0 and own.activation_bytes > 0
    page = report(make_results([published, own]))
    assert "| published loop | out of memory |" in page


def test_a_device_that_is_too_small_is_named(tiny_model):
    with pytest.raises(step.InputError, match="^--size: not even a step with gradient checkpointing fits"):
        device = SmallDevice(0)
        device.calls_that_fail = {0, 1}
        step.StepBenchmark(tiny_model, device, 1)


def test_copies_of_the_transformer_share_its_weights(tiny_model):
    first, second = tiny_model.transformer(), tiny_model.transformer()
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    assert first is not second and all(one is other for one, other in pairs)
    assert first.transformer_blocks[0] is not second.transformer_blocks[0]


def test_pairs_alternate_in_order():
    calls = []
    loops = {name: [lambda name=name: calls.append(name)] * count for name, count in (("a", 2), ("b", 1))}
    times = measure_pairs(CpuDevice(), loops, 3)
    assert "".join(calls) == "aab" + "baa" + "aab"
    assert [len(times[name]) for name in ("a", "b")] == [3, 3]


def test_a_gpu_is_measured_by_its_events_and_allocator(monkeypatch):
    """With a stand-in for the GPU: the calls that a real one would get."""
    log = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append("record")

        def elapsed_time(self, other):
            return 1500.0  # ms

    fake = SimpleNamespace(
        Event=Event,
        synchronize=lambda: log.append("synchronize"),
        reset_peak_memory_stats=lambda: log.append("reset"),
        memory_allocated=lambda: 100,
        max_memory_allocated=lambda: 350,
    )
    monkeypatch.setattr("benchmarks.step_measure.torch.cuda", fake)
    device = CudaDevice()
    assert device.seconds(lambda: log.append("call")).busy == 1.5
    assert log == ["synchronize", "record", "call", "record", "synchronize"]
    log.clear()
    assert device.peak_bytes(lambda: log.append("call"), is_compiled=True) == 250
    assert log == ["synchronize", "reset", "call", "synchronize"]


def test_other_errors_are_not_taken_for_a_lack_of_memory():
    def fail():
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        unless_out_of_memory(fail)


def make_results(rows: list[Row], memory: list[MemoryRow] | None = None, size: str = "thin") -> Results:
    return Results(size, {"device": "a CPU"}, 3, 6, {"picture": 0.5}, rows, memory or [], None, 60.0)


def test_the_report_says_which_targets_of_time_are_met():
    names = {case.name for case in step.make_cases("native")}
    assert TIME_TARGETS.keys() <= names
    row = Row("all states", [], True, [Seconds(2.0, 1.0)], [0.9, 0.94, 1.2], [], 300 * 10**6, 10**9, 0.3, 1e-6)
    page = report(make_results([row]))
    assert "| all states | 1 | 0.94 (0.90 to 1.20) | - | 300.0 | 0.30 | 1.3 | 1e-06 | ≤ 0.95: met |" in page
    slow, unknown = (replace(row, of_published=ratios) for ratios in ([0.96], []))
    assert "| ≤ 0.95: not met |" in report(make_results([slow]))
    assert "| all states (the compiler failed: not compiled) |" in report(
        make_results([replace(row, compiler_failed=True)])
    )
    assert "| ≤ 0.95: not measured |" in report(make_results([unknown]))
    assert "≤" not in report(make_results([row], size="klein-4b"))


def test_the_report_says_which_targets_of_memory_are_met():
    shapes = [(2, 64, 100, 200), (4, 64, 104, 400), (8, 64, 106, None), (4, 384, 500, 2000)]
    memory = [
        MemoryRow(count, side, False, own * 10**6, None if published is None else published * 10**6)
        for count, side, own, published in shapes
    ]
    page = report(make_results([], memory))
    assert "| 4 states, 64 pixels | 104.0 | 400.0 | 0.26 | +4.0% |  |" in page
    assert "| 8 states, 64 pixels | 106.0 | - | - | +6.0% | growth ≤ 0.05: not met |" in page
    assert "| 4 states, 384 pixels | 500.0 | 2,000.0 | 0.25 |  | ≤ 0.26: met |" in page
