"""Where off-policy distillation breaks, if it does: beside D-OPSD at the same rates, under worse conditions."""

from dataclasses import dataclass, replace

from benchmarks.miniature import world
from benchmarks.miniature.concepts import CONCEPTS, Concept
from benchmarks.miniature.methods import NUM_TRAIN_STEPS
from benchmarks.miniature.rival_methods import (
    CACHED_ONE_PRIOR,
    DOPSD_ALL,
    DOPSD_ONE_PRIOR,
    OFF_POLICY,
    RECIPES,
    Rival,
    RivalPlan,
    RivalRun,
)
from benchmarks.miniature.rival_runs import FaultyLesson


PAIRS = ((DOPSD_ONE_PRIOR, CACHED_ONE_PRIOR), (DOPSD_ALL, OFF_POLICY))  # the former one's setting is that of both
LONG_STEPS, HIGH_RATE = 480, 3
WRONG = world.Appearance("square", "striped", ("red", "green"))


@dataclass(frozen=True)
class Condition:
    """What differs from the chosen setting.

    Attributes:
        concept: what is taught, and with which pictures.
        num_steps: None for the chosen number.
        relative_rate: of the chosen learning rate.
    """

    concept: Concept
    num_steps: int | None = None
    relative_rate: float = 1.0

    def changed(self, rival: Rival) -> Rival:
        rate = self.relative_rate * rival.flags["learning_rate"]
        steps = rival.relative_steps if self.num_steps is None else self.num_steps / NUM_TRAIN_STEPS
        return replace(rival, flags=rival.flags | {"learning_rate": rate}, relative_steps=steps)


def faulty(name: str, **faults: object) -> FaultyLesson:
    return FaultyLesson(**vars(replace(CONCEPTS[0], name=f"{CONCEPTS[0].name}-{name}")), **faults)


CONDITIONS = {
    "as chosen": Condition(CONCEPTS[0]),
    f"{LONG_STEPS} steps": Condition(CONCEPTS[0], num_steps=LONG_STEPS),
    f"learning rate x {HIGH_RATE}": Condition(CONCEPTS[0], relative_rate=HIGH_RATE),
    "one training picture": Condition(faulty("one-picture", num_pictures=1)),
    "one picture of four shows another object": Condition(faulty("wrong-picture", wrong=WRONG)),
}


def study(plan: RivalPlan) -> dict[str, dict[str, list[RivalRun]]]:
    """Condition -> method -> runs. The grids must be complete. Empty without `RivalPlan.study_seeds`."""
    if not plan.study_seeds:
        return {}
    table = {}
    for condition_name, condition in CONDITIONS.items():
        by_method = {}
        for pair in PAIRS:
            setting = plan.chosen(RECIPES[pair[0]])
            num_steps = setting.num_steps(NUM_TRAIN_STEPS)
            for name in pair:
                rival = condition.changed(RECIPES[name].at(setting.flags["learning_rate"], num_steps))
                by_method[name] = [RivalRun(condition.concept, seed, rival) for seed in plan.study_seeds]
        table[condition_name] = by_method
    return table
