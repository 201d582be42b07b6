"""Thirty of the generator's cases, and how the generator judges a run."""

import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from command_line import LORA_FILE
from faults import areas  # noqa: F401
from faults.cases import AREAS, Case, Verdict, all_kinds, kind_of, make_case, name_of
from faults.damage import damage_json, damaged
from faults.lab import Lab
from faults.report import run_one
from faults.running import Run, judge
from models import SLOW


SCRIPT = "train_x.py"
# Of 30 kinds, from all areas.
NUMBERS = range(44, 164, 4)


@pytest.fixture(scope="session")
def lab(tmp_path_factory, forkserver):
    """Good input and undisturbed runs; a run that takes a minute hangs."""
    return Lab(tmp_path_factory.mktemp("lab"), forkserver, timeout=60)


@SLOW
@pytest.mark.parametrize("number", NUMBERS, ids=lambda number: f"{number}-{name_of(kind_of(number))}")
def test_a_fault_is_trained_through_or_refused_in_one_line(lab, number):
    result = run_one(lab, 0, number)
    assert not result.outcome.verdict.is_failure, f"{result.line(0)}\n{result.outcome.run.log}"


def test_the_cases_of_the_suite_are_of_thirty_kinds_in_all_areas():
    kinds = {kind_of(number) for number in NUMBERS}
    assert len(kinds) == 30
    assert {name_of(kind).partition(".")[0] for kind in kinds} == {*AREAS}


def test_every_kind_takes_its_turn():
    kinds = all_kinds()
    assert len(kinds) == sum(map(len, AREAS.values())) > 100
    assert {kind_of(number) for number in range(len(kinds))} == {*kinds}


def contents(folder: Path) -> dict:
    return {
        path.relative_to(folder): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))
    }


@pytest.mark.parametrize("kind", ["pictures.damaged_bytes", "captions.jsonl_values", "data_sets.odd_folder"])
def test_a_case_depends_on_its_seed_and_number_only(lab, tmp_path, kind):
    number = [name_of(function) for function in all_kinds()].index(kind)
    first = make_case(lab, 0, number, tmp_path / "a" / "case")
    before = contents(tmp_path / "a" / "case")
    make_case(lab, 0, number + 1, tmp_path / "other")
    (tmp_path / "a").rename(tmp_path / "b")
    again = make_case(lab, 0, number, tmp_path / "a" / "case")
    assert first == again and contents(tmp_path / "a" / "case") == before
    others = [make_case(lab, seed, number, tmp_path / str(seed))[1].what for seed in range(1, 6)]
    assert len({first[1].what, *others}) > 1


def test_damage_changes_the_bytes_most_of_the_time():
    rng = random.Random(0)
    results = [damaged(rng, b"0123456789" * 50) for _ in range(200)]
    assert len({what for _, what in results}) > 20
    assert sum(data != b"0123456789" * 50 for data, _ in results) > 190


def test_json_is_damaged_in_one_place(tmp_path):
    rng = random.Random(0)
    path = tmp_path / "x.json"
    seen = set()
    for _ in range(50):
        path.write_text(json.dumps({"a": 1, "b": {"c": [1, 2]}}))
        seen.add(damage_json(rng, path))
    assert len(seen) > 20


# Verdicts


def finished(folder: Path, value: float = 1.0) -> Path:
    folder.mkdir(exist_ok=True)
    save_file({"x": torch.full((2,), value)}, folder / LORA_FILE)
    return folder


def verdict_of(run: Run, output_dir: Path, **case) -> Verdict:
    return judge(Case("x", "flux2", **case), run, SCRIPT, output_dir)[0]


ERROR = f"INFO\n{SCRIPT}: error: --rank 0: must be at least 1"
LOGS = {
    "refused": (1, ERROR, Verdict.REFUSED),
    "refused by the parser": (2, ERROR + "\n", Verdict.REFUSED),
    "hangs": (None, "INFO", Verdict.HANG),
    "traceback": (1, 'Traceback (most recent call last):\n  File "x"\nKeyError: 1\n', Verdict.TRACEBACK),
    "traceback before the error": (1, f"Traceback (most recent call last):\nKeyError\n{ERROR}", Verdict.TRACEBACK),
    "nothing said": (1, "", Verdict.TRACEBACK),
    "killed": (-9, "INFO\n", Verdict.TRACEBACK),
    "two lines": (1, ERROR + "\nsecond line", Verdict.TRACEBACK),
    "two errors": (1, f"{ERROR}\n{ERROR}", Verdict.TRACEBACK),
    "too long": (1, ERROR + "x" * 400, Verdict.TRACEBACK),
}


@pytest.mark.parametrize("log", LOGS)
def test_the_verdict_on_a_run_that_fails(tmp_path, log):
    code, text, expected = LOGS[log]
    assert verdict_of(Run(code, text), tmp_path) == expected


def test_the_verdict_on_a_run_that_trains(tmp_path):
    good, other = finished(tmp_path / "good"), finished(tmp_path / "other", 2.0)
    done = Run(0, "INFO")
    assert verdict_of(done, good) == Verdict.TRAINED
    assert verdict_of(done, good, weights=finished(tmp_path / "same")) == Verdict.TRAINED
    assert verdict_of(done, good, weights=other) == Verdict.DIFFERENT
    assert verdict_of(done, good, must="refuse") == Verdict.DIFFERENT
    assert verdict_of(done, finished(tmp_path / "nan", float("nan"))) == Verdict.DIFFERENT
    assert verdict_of(done, tmp_path / "nowhere") == Verdict.DIFFERENT
    assert verdict_of(done, tmp_path / "nowhere", saves_lora=False) == Verdict.TRAINED
    assert verdict_of(Run(0, "Traceback (most recent call last)\nKeyError"), good) == Verdict.TRACEBACK


def test_a_needless_refusal_and_executed_code_are_failures(tmp_path):
    assert verdict_of(Run(1, ERROR), tmp_path, must="train") == Verdict.DIFFERENT
    payload = tmp_path / "executed"
    assert verdict_of(Run(1, ERROR), tmp_path, payload=payload) == Verdict.REFUSED
    payload.touch()
    assert verdict_of(Run(1, ERROR), tmp_path, payload=payload) == Verdict.TRACEBACK
