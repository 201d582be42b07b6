"""The command: runs cases, prints the failures and the counts."""

import argparse
import shlex
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from command_line import Forkserver

from . import areas  # noqa: F401
from .cases import Case, Verdict, area_of, kind_of, make_case
from .lab import Lab
from .running import Outcome, run_case


MAX_REASON = 500
LINES_OF_FAILURE, LINES_OF_SUCCESS = 40, 2


@dataclass(frozen=True)
class Result:
    number: int
    kind: str
    case: Case
    outcome: Outcome

    def line(self, seed: int) -> str:
        """The failure in one line, and how to run this case alone."""
        reason = self.outcome.reason[:MAX_REASON]
        text = (
            f"{self.outcome.verdict}: case {self.number}, {self.kind} ({self.case.model}): {self.case.what}: {reason}"
        )
        return f"{printable(text)} | python -m tests.faults --seed {seed} --only {self.number}"

    def entry(self, seed: int) -> str:
        """The line, and the end of the run's output: more of it after a failure."""
        num_lines = LINES_OF_FAILURE if self.outcome.verdict.is_failure else LINES_OF_SUCCESS
        return "\n    ".join([self.line(seed), *(line[:400] for line in self.outcome.run.lines[-num_lines:])]) + "\n"


def printable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode().replace("\n", "\\n").replace("\r", "\\r")


def run_one(lab: Lab, seed: int, number: int, *, keep: bool = False) -> Result:
    """Runs one case in a folder of its own, which is removed unless it is kept."""
    folder = lab.folder / f"case-{number}"
    try:
        name, case = make_case(lab, seed, number, folder)
        return Result(number, name, case, run_case(lab, case, folder))
    finally:
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)


def run_cases(lab: Lab, seed: int, numbers: Iterable[int], jobs: int) -> Iterator[Result]:
    """Results in the order in which they come."""
    with ThreadPoolExecutor(jobs) as pool:
        for future in as_completed([pool.submit(run_one, lab, seed, number) for number in numbers]):
            yield future.result()


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--count", type=int, default=400, help="number of cases")
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, metavar="N", help="run case N alone, show its log and keep its folder")
    parser.add_argument("--area", help="run only the cases of this area, such as pictures")
    parser.add_argument("--jobs", type=int, default=1, help="cases that run at the same time")
    parser.add_argument("--timeout", type=float, default=60, metavar="SECONDS", help="after which a run hangs")
    parser.add_argument("--log", type=Path, metavar="FILE", help="also write every case's verdict and last lines here")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    options = parse(arguments)
    root = Path(tempfile.mkdtemp(prefix="faults-"))
    lab = Lab(root, Forkserver(root), options.timeout)
    try:
        if options.only is not None:
            return show(lab, options.seed, options.only)
        return run_all(lab, options)
    finally:
        if options.only is None:
            shutil.rmtree(root, ignore_errors=True)


def show(lab: Lab, seed: int, number: int) -> int:
    """Runs one case and prints all about it."""
    result = run_one(lab, seed, number, keep=True)
    script, command_line = lab.command_line(result.case, lab.folder / f"case-{number}" / "run")
    print(result.outcome.run.log)
    print(printable(f"case {number}, {result.kind} ({result.case.model}): {result.case.what}"))
    print(printable(f"folder: {lab.folder / f'case-{number}'}"))
    print(printable(f"command: {script.name} {shlex.join(command_line)}"[:4000]))
    print(printable(f"{result.outcome.verdict}: {result.outcome.reason}"), flush=True)
    return int(result.outcome.verdict.is_failure)


def run_all(lab: Lab, options: argparse.Namespace) -> int:
    numbers = range(options.first, options.first + options.count)
    if options.area:
        numbers = [number for number in numbers if area_of(kind_of(number)) == options.area]
    counts = Counter()
    with tqdm(total=len(numbers), desc="Faults", unit="case") as progress:
        for result in run_cases(lab, options.seed, numbers, options.jobs):
            counts[result.outcome.verdict] += 1
            if result.outcome.verdict.is_failure:
                tqdm.write(result.line(options.seed))
                sys.stdout.flush()
            if options.log:
                with options.log.open("a", encoding="utf-8", errors="backslashreplace") as file:
                    file.write(result.entry(options.seed))
            failures = sum(counts[verdict] for verdict in Verdict if verdict.is_failure)
            progress.set_postfix(failures=failures)
            progress.update()
    summary = {"tried": counts.total(), **{verdict.value: counts[verdict] for verdict in Verdict}}
    print(", ".join(f"{name} {count}" for name, count in summary.items()), flush=True)
    return int(failures > 0)
