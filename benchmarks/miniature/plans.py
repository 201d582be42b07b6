"""What the experiment compares on each miniature: tables, sheets, numbers of sampling steps."""

from dataclasses import dataclass, field

from benchmarks.miniature import methods, zimage_methods
from benchmarks.miniature.architecture import Architecture
from benchmarks.miniature.concepts import CONCEPTS, RENAMING, Concept, Renaming
from benchmarks.miniature.methods import (
    BASE,
    LARGE_EPSILON,
    USUAL_EPSILON,
    Method,
    RunsByMethod,
    learning_rate_grid,
    runs_by_method,
)
from benchmarks.miniature.zimage import ZIMAGE


SEEDS = (0, 1, 2)
TUNING_SEED = 3  # of the runs that learning rates are chosen by; not among the seeds that are reported
RENAMING_TITLE = f"A lesson that prior preservation resists: {RENAMING.word!r} is to mean {RENAMING.meaning!r}"
ON_OBJECT = f"concept {CONCEPTS[0].name!r}"


@dataclass(frozen=True)
class Comparison:
    """A table of the report.

    Attributes:
        name: of its plot, and in the code.
        has_stacks: whether the LoRAs of two concepts are measured together.
        rates: the learning rates, if it is a grid of `learning_rate_grid`.
    """

    name: str
    title: str
    methods: tuple[Method, ...]
    concepts: tuple[Concept | Renaming, ...]
    seeds: tuple[int, ...]
    has_stacks: bool = False
    rates: tuple[float, ...] = ()

    @property
    def runs(self) -> RunsByMethod:
        return runs_by_method(self.methods, self.concepts, self.seeds)


@dataclass(frozen=True)
class Plan:
    """Everything that an experiment makes.

    Attributes:
        comparisons: the first one is shown for each concept, and on the sheets.
        by_step_count: runs that are compared at several numbers of sampling steps.
        step_counts: these numbers.
        shown: columns of the sheet and their methods, of the first comparison.
        retained: methods whose retention is compared with their other figures.
    """

    comparisons: list[Comparison]
    by_step_count: RunsByMethod
    step_counts: tuple[int, ...]
    shown: dict[str, Method]
    retained: dict[str, Method] = field(default_factory=dict)


def make_plan(architecture: Architecture, *, is_quick: bool) -> Plan:
    return zimage_plan(is_quick=is_quick) if architecture is ZIMAGE else klein_plan(is_quick=is_quick)


def klein_plan(*, is_quick: bool) -> Plan:
    every, one, renaming = (CONCEPTS, SEEDS), (CONCEPTS[:1], SEEDS), ((RENAMING,), SEEDS)
    sft, dopsd, both = methods.SFT, methods.DOPSD, methods.DOPSD_BOTH
    retained = {"base": BASE, "D-OPSD": dopsd, "SFT": sft, "D-OPSD, one state + prior": both}
    if is_quick:
        comparisons = [quick_table(methods.QUICK_TABLE)]
    else:
        retained |= {"D-OPSD, large epsilon": methods.PUBLISHED, "a live teacher": methods.LIVE}
        comparisons = [
            Comparison("first_table", "First table", methods.FIRST_TABLE, *every, has_stacks=True),
            Comparison("equal_cost", "At the cost of D-OPSD", methods.EQUAL_COST_TABLE, *every, has_stacks=True),
            Comparison(
                "large_epsilon",
                f"With an epsilon of {LARGE_EPSILON:g}, seed {SEEDS[0]}",
                methods.LARGE_EPSILON_TABLE,
                CONCEPTS,
                SEEDS[:1],
            ),
            Comparison("sampling", f"How states are sampled, {ON_OBJECT}", methods.SAMPLING_TABLE, *one),
            Comparison("prior", f"Kinds of prior preservation, {ON_OBJECT}", methods.PRIOR_TABLE, *one),
            Comparison("renaming", RENAMING_TITLE, methods.RENAMING_TABLE, *renaming),
            Comparison("ablations", f"Ablations, {ON_OBJECT}, epsilon {LARGE_EPSILON:g}", methods.ABLATIONS, *one),
            *(grid(epsilon, rates) for epsilon, rates in methods.LEARNING_RATE_GRIDS.items()),
        ]
    return Plan(
        comparisons,
        by_step_count=runs_by_method(methods.STEP_TABLE, CONCEPTS[:1], SEEDS[:1]),
        step_counts=(1, 2, 4, 8),
        shown={"base": BASE, "SFT": sft, "D-OPSD": dopsd, "D-OPSD with prior": both},
        retained=retained,
    )


def zimage_plan(*, is_quick: bool) -> Plan:
    every, one = (CONCEPTS, SEEDS), (CONCEPTS[:1], SEEDS)
    sft, dopsd, both = zimage_methods.SFT, zimage_methods.DOPSD, zimage_methods.DOPSD_BOTH
    stepped = tuple(method for method in zimage_methods.FIRST_TABLE if method.kind != "teacher")
    if is_quick:
        comparisons = [quick_table(zimage_methods.QUICK_TABLE)]
        by_step_count = runs_by_method((BASE, sft, dopsd, both), CONCEPTS[:1], SEEDS[:1])
    else:
        comparisons = [
            Comparison("first_table", "First table", zimage_methods.FIRST_TABLE, *every, has_stacks=True),
            Comparison("rollout", f"Steps of the rollout, {ON_OBJECT}", zimage_methods.ROLLOUT_TABLE, *one),
            Comparison("rope", f"RoPE of the teacher, {ON_OBJECT}", zimage_methods.ROPE_TABLE, *one),
            grid(USUAL_EPSILON, zimage_methods.LEARNING_RATE_GRID),
        ]
        rollout = runs_by_method(zimage_methods.ROLLOUT_TABLE, CONCEPTS[:1], SEEDS)
        by_step_count = runs_by_method(stepped, *every) | {
            name: runs for name, runs in rollout.items() if "8-step" in name
        }
    return Plan(
        comparisons,
        by_step_count=by_step_count,
        step_counts=(4, 8),
        shown={"base": BASE, "SFT": sft, "D-OPSD": dopsd, "D-OPSD with prior": both},
        retained={"base": BASE, "D-OPSD": dopsd, "SFT": sft, "D-OPSD, one state + prior": both},
    )


def quick_table(of: tuple[Method, ...]) -> Comparison:
    return Comparison("first_table", "First table", of, CONCEPTS[:1], SEEDS[:1])


def grid(epsilon: float, rates: tuple[float, ...]) -> Comparison:
    return Comparison(
        f"grid_{epsilon:g}",
        f"Learning rates with an epsilon of {epsilon:g}, {ON_OBJECT}, seed {TUNING_SEED}",
        learning_rate_grid(epsilon, rates),
        CONCEPTS[:1],
        (TUNING_SEED,),
        rates=rates,
    )
