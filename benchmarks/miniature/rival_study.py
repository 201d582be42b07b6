"""Where off-policy distillation breaks, if it does: beside D-OPSD at its setting, under worse conditions."""

from dataclasses import dataclass, replace

from benchmarks.miniature import world
from benchmarks.miniature.concepts import Concept
from benchmarks.miniature.methods import NUM_TRAIN_STEPS
from benchmarks.miniature.rival_methods import (
    CACHED_ONE_PRIOR,
    DOPSD_ALL,
    DOPSD_ONE_PRIOR,
    GRID_CONCEPT,
    OFF_POLICY,
    RECIPES,
    Recipe,
    Rival,
    RivalPlan,
    RivalRun,
)
from benchmarks.miniature.rival_runs import FaultyLesson


HELD, UNHELD = (DOPSD_ONE_PRIOR, CACHED_ONE_PRIOR), (DOPSD_ALL, OFF_POLICY)  # with a prior, and without one
LONG_STEPS, HIGH_RATE = 480, 3
MORE_SEEDS = (1, 2, 4, 5)  # 3 is the grids'
WRONG = world.Appearance("square", "striped", ("red", "green"))


@dataclass(frozen=True)
class Condition:
    """What differs from the chosen setting.

    Attributes:
        concept: what is taught, and with which pictures.
        num_steps: None for the chosen number.
        relative_rate: of the chosen learning rate.
        more_seeds: besides the plan's, of the methods with a prior, where one run tells too little.
    """

    concept: Concept
    num_steps: int | None = None
    relative_rate: float = 1.0
    more_seeds: tuple[int, ...] = ()

    def changed(self, rival: Rival) -> Rival:
        rate = self.relative_rate * rival.flags["learning_rate"]
        steps = rival.relative_steps if self.num_steps is None else self.num_steps / NUM_TRAIN_STEPS
        return replace(rival, flags=rival.flags | {"learning_rate": rate}, relative_steps=steps)


def faulty(name: str, **faults: object) -> FaultyLesson:
    return FaultyLesson(**vars(replace(GRID_CONCEPT, name=f"{GRID_CONCEPT.name}-{name}")), **faults)


CONDITIONS = {
    "as chosen": Condition(GRID_CONCEPT),
    f"{LONG_STEPS} steps": Condition(GRID_CONCEPT, num_steps=LONG_STEPS),
    f"learning rate x {HIGH_RATE}": Condition(GRID_CONCEPT, relative_rate=HIGH_RATE),
    "one training picture": Condition(faulty("one-picture", num_pictures=1)),
    "one picture of four shows another object": Condition(faulty("wrong-picture", wrong=WRONG), more_seeds=MORE_SEEDS),
}


def study(plan: RivalPlan) -> dict[str, dict[str, list[RivalRun]]]:
    """Condition -> method -> runs. The grids must be complete. Empty without `RivalPlan.study_seeds`."""
    if not plan.study_seeds:
        return {}

    def runs(condition: Condition) -> dict[str, list[RivalRun]]:
        return {
            rival.name: [RivalRun(condition.concept, seed, condition.changed(rival)) for seed in seeds]
            for pair, seeds in ((HELD, (*plan.study_seeds, *condition.more_seeds)), (UNHELD, plan.study_seeds))
            for rival in compared(plan, *map(RECIPES.get, pair))
        }

    return {name: runs(condition) for name, condition in CONDITIONS.items()}


def compared(plan: RivalPlan, dopsd: Recipe, off_policy: Recipe) -> list[Rival]:
    """Both at the setting that was chosen for D-OPSD, and off-policy at its own, if that is another."""
    setting, own = plan.chosen(dopsd), plan.chosen(off_policy)
    same = off_policy.at(setting.flags["learning_rate"], setting.num_steps(NUM_TRAIN_STEPS))
    return [setting, same, *([] if own == same else [replace(own, name=f"{own.name}, its own setting")])]
