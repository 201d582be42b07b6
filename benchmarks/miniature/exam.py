"""Examines teachers of known kind, good and bad, and counts the verdicts.

    python -m benchmarks.miniature.exam      # two tables and what is wrong in them, in about five minutes

The thresholds of `dopsd/exam/thresholds.py` were chosen on the first half of the subjects. The second half, which they
do not know, is reported beside it.
"""

import argparse
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.miniature.command_line import HelpFormatter, positive_int, run
from benchmarks.miniature.exam_teachers import KINDS, Kind, examine, make_class, subjects
from benchmarks.miniature.files import MODEL, check_model
from benchmarks.miniature.workers import disable_progress_bars
from dopsd.exam.results import Exam
from dopsd.exam.verdict import COPIES, NO_BETTER, TEACHES, VERDICTS, best_lead, is_surely_no_better, verdict
from pipelines.flux2_klein import Flux2KleinDOPSDPipeline


NUM_SUBJECTS = 12
ROW_COUNTS = (1, 2, 3, 4)


@dataclass(frozen=True)
class Examined:
    """The exam of one teacher of known kind."""

    kind: Kind
    subject: str
    exam: Exam

    @property
    def verdict(self) -> str:
        return verdict(self.exam)

    @property
    def is_right(self) -> bool:
        return self.verdict == self.kind.expected

    def with_rows(self, count: int) -> "Examined":
        return replace(self, exam=replace(self.exam, rows=self.exam.rows[:count]))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL, help="Folder of the miniature. Default: the shipped one.")
    parser.add_argument(
        "--num_subjects", type=positive_int, default=NUM_SUBJECTS, help=f"Each has {len(KINDS)} teachers."
    )
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    check_model(args.model)
    disable_progress_bars()
    pipeline = Flux2KleinDOPSDPipeline.from_pretrained(args.model)
    examined = [*examine_all(pipeline, args.num_subjects)]
    middle = len(KINDS) * -(-args.num_subjects // 2)
    halves = {"Calibration": examined[:middle], "Held out": examined[middle:]}
    print("\n\n".join(report(halves)))


def examine_all(pipeline: Flux2KleinDOPSDPipeline, num_subjects: int) -> Iterable[Examined]:
    """The teachers of every kind, subject by subject."""
    concepts = subjects(num_subjects)
    for seed, (concept, wrong) in enumerate(zip(concepts, [*concepts[1:], concepts[0]], strict=True)):
        school = make_class(pipeline, concept, wrong, seed)
        yield from (Examined(kind, concept.name, examine(kind, school)) for kind in KINDS)


# The report, in Markdown


def report(halves: dict[str, list[Examined]]) -> list[str]:
    parts = []
    for name, examined in halves.items():
        title = f"{name}: {sum(one.is_right for one in examined)} of {len(examined)} verdicts right"
        parts += [f"## {title}", confusion(examined), *mistakes(examined)]
    everything = [one for examined in halves.values() for one in examined]
    return [*parts, "## Figures, least to most", figures(everything), "## With fewer rows, held out", by_rows(halves)]


def table(headings: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    lines = [list(map(str, row)) for row in (headings, *rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def by_kind(examined: list[Examined]) -> Iterable[tuple[Kind, list[Examined]]]:
    for kind in KINDS:
        if found := [one for one in examined if one.kind == kind]:
            yield kind, found


def confusion(examined: list[Examined]) -> str:
    """A row for each kind, a column for each verdict, and how many of the runs would be stopped."""
    shown = [name for name in VERDICTS if any(name in (one.verdict, one.kind.expected) for one in examined)]
    rows = []
    for kind, found in by_kind(examined):
        counts = Counter(one.verdict for one in found)
        cells = [f"**{counts[name]}**" if name == kind.expected else counts[name] or "" for name in shown]
        rows.append([kind.name, *cells, sum(is_surely_no_better(one.exam) for one in found) or ""])
    return table(["teacher", *shown, "stopped"], rows)


def mistakes(examined: list[Examined]) -> list[str]:
    wrong = [one for one in examined if not one.is_right]
    lines = [f"- {one.kind.name}, {one.subject}: {one.verdict} instead of {one.kind.expected}" for one in wrong]
    return ["\n".join(lines)] if lines else []


def figures(examined: list[Examined]) -> str:
    """What the thresholds are applied to: for each kind, the least and the largest of its teachers' figures."""
    columns = {
        "lead": lambda exam: best_lead(exam),
        "lead, upper limit": lambda exam: max(lead.at_most for lead in exam.deciding_leads.values()),
        "change": lambda exam: exam.change,
        "sharpness kept": lambda exam: exam.sharpness_kept,
        "zoom": lambda exam: (motion := exam.motion("teacher")) and motion.scale,
        "quality": lambda exam: min(row.teacher.alignment.quality for row in exam.rows),
    }
    rows = []
    for kind, found in by_kind(examined):
        values = [[value for one in found if (value := column(one.exam)) is not None] for column in columns.values()]
        rows.append([kind.name, *(f"{min(some):.2f} to {max(some):.2f}" if some else "-" for some in values)])
    return table(["teacher", *columns], rows)


def by_rows(halves: dict[str, list[Examined]]) -> str:
    """Verdicts and stops of the second half, if the exam has fewer rows."""
    held_out, rows = [*halves.values()][-1], []
    good = [one for one in held_out if one.kind.expected in (TEACHES, COPIES)]
    idle = [one for one in held_out if one.kind.expected == NO_BETTER]
    for count in ROW_COUNTS:
        right = sum(one.with_rows(count).is_right for one in held_out)
        stops = [sum(is_surely_no_better(one.with_rows(count).exam) for one in some) for some in (good, idle)]
        rows.append([count, f"{right} of {len(held_out)}", f"{stops[0]} of {len(good)}", f"{stops[1]} of {len(idle)}"])
    return table(["rows", "right verdicts", "stopped, though good", "stopped of those that are no better"], rows)


if __name__ == "__main__":
    run(main)
