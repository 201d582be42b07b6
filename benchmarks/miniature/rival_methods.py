"""D-OPSD and its rivals, their grids, and what is chosen from these."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.miniature.architecture import Architecture
from benchmarks.miniature.concepts import CONCEPTS, Concept
from benchmarks.miniature.costs import NUM_PRIOR_PICTURES, NUM_ROLLOUT_STEPS, sampled_cost, training_cost
from benchmarks.miniature.methods import ALL_STATES, NUM_TRAIN_STEPS, ONE_STATE, SHARED_FLAGS, Method, Run
from benchmarks.miniature.once import ADAPTER, UNDISTILLED
from benchmarks.miniature.tables import score, value_of


GRID_STEPS = (60, 120, 240)
# Where nothing is held; where trajectories are; where pictures are, or a many-step model's change is taught.
LOW_RATES, RATES, HIGH_RATES = (3e-4, 1e-3, 3e-3), (1e-3, 3e-3, 1e-2), (3e-3, 1e-2, 2e-2)
NUM_TAUGHT_TRAJECTORIES = 64  # of the teacher, cached
REPAIR, DELTA, DELTA_PRIOR = "repair", "delta", "delta_prior"
OFF_POLICY_PRIOR, OFF_POLICY_ONE_PRIOR = "off_policy_prior", "off_policy_one_prior"


@dataclass(frozen=True)
class Rival(Method):
    """A method with one learning rate and number of steps.

    Attributes:
        kind: as in `Method`, or
            "off_policy_prior": off-policy and held to the base on its trajectories, both cached; all states;
            "off_policy_one_prior": the same at one state of each trajectory;
            "repair": the LoRA of `source`, sampled with the repair LoRA;
            "delta", "delta_prior": delta transfer of what `source` trained; the latter holds prior prompts.
        trained_on: "" for the base; `ADAPTER` or `UNDISTILLED` for the model that the LoRA is trained on.
        source: the method whose LoRA is used.
    """

    trained_on: str = ""
    source: "Rival | None" = None

    @property
    def key(self) -> str:
        """Tells rivals apart that have equal flags."""
        parts = [self.trained_on, self.source and f"{Run(CONCEPTS[0], 0, self.source).folder.name}{self.source.key}"]
        return "".join(f"-on-{part}" for part in parts if part)

    def cost(self, num_steps: int, architecture: Architecture) -> float:
        if self.kind == REPAIR:
            return self.source.cost(num_steps, architecture)
        flags, costs = SHARED_FLAGS | self.flags, architecture.costs
        samples = num_steps * flags["train_batch_size"]
        if self.kind in (OFF_POLICY_PRIOR, OFF_POLICY_ONE_PRIOR):
            num_states = NUM_ROLLOUT_STEPS if self.kind == OFF_POLICY_PRIOR else 1
            cached = NUM_ROLLOUT_STEPS * (NUM_TAUGHT_TRAJECTORIES * costs.teacher + NUM_PRIOR_PICTURES * costs.base)
            return cached + samples * 2 * num_states * costs.forward_and_backward
        if self.kind in (DELTA, DELTA_PRIOR):
            # The teacher is the base, and the many-step model before and after.
            teachers = [3 * costs.base] + [costs.base] * (self.kind == DELTA_PRIOR)
            each = sum(sampled_cost(1, NUM_ROLLOUT_STEPS, cost, costs.forward_and_backward) for cost in teachers)
            relative_steps = self.source.relative_steps / self.relative_steps
            return self.source.cost(round(num_steps * relative_steps), architecture) + samples * each
        return training_cost(self.kind, flags, num_steps, architecture)


@dataclass(frozen=True)
class RivalRun(Run):
    """A run of a `Rival`."""

    @property
    def folder(self) -> Path:
        folder = super().folder
        return folder.with_name(folder.name + self.method.key)

    @property
    def source(self) -> "RivalRun":
        """The run whose LoRA this one uses."""
        return replace(self, method=self.method.source)


@dataclass(frozen=True)
class Recipe:
    """A row of the tables, and its grid.

    Attributes:
        rival: at no particular learning rate and number of steps.
        rates: learning rates of the grid.
        source: the recipe whose chosen LoRA delta transfer starts from.
    """

    rival: Rival
    rates: tuple[float, ...]
    source: str | None = None

    @property
    def name(self) -> str:
        return self.rival.name

    def at(self, learning_rate: float, num_steps: int, source: Rival | None = None) -> Rival:
        flags = {"learning_rate": learning_rate}
        relative_steps = num_steps / NUM_TRAIN_STEPS
        if self.rival.kind == REPAIR:
            tuned = replace(self.rival.source, flags=flags, relative_steps=relative_steps)
            return replace(self.rival, flags=flags, relative_steps=relative_steps, source=tuned)
        return replace(self.rival, flags=self.rival.flags | flags, relative_steps=relative_steps, source=source)

    @property
    def needs_others(self) -> bool:
        """Whether other recipes' runs come first."""
        return bool(self.source or self.rival.source)


SFT, SFT_PRIOR = Rival("SFT", "sft"), Rival("SFT + prior pictures", "sft_prior")
DOPSD_ONE_PRIOR, DOPSD_ALL = "D-OPSD, 1 state + prior", "D-OPSD, all states"
CACHED_ONE_PRIOR, OFF_POLICY = "off-policy + prior, cached, 1 state", "off-policy"
# Families, in the order of the tables and plots.
FAMILIES = {
    "SFT": (
        Recipe(SFT, LOW_RATES),
        Recipe(SFT_PRIOR, HIGH_RATES),
    ),
    "repair LoRA": (
        Recipe(Rival("SFT, repaired", REPAIR, source=SFT), LOW_RATES),
        Recipe(Rival("SFT + prior pictures, repaired", REPAIR, source=SFT_PRIOR), HIGH_RATES),
    ),
    "training adapter": (
        Recipe(replace(SFT, name="training adapter", trained_on=ADAPTER), LOW_RATES),
        Recipe(replace(SFT_PRIOR, name="training adapter + prior pictures", trained_on=ADAPTER), HIGH_RATES),
    ),
    "undistilled model": (
        Recipe(replace(SFT, name="undistilled", trained_on=UNDISTILLED), LOW_RATES),
        Recipe(replace(SFT_PRIOR, name="undistilled + prior pictures", trained_on=UNDISTILLED), HIGH_RATES),
    ),
    "off-policy": (
        Recipe(Rival(OFF_POLICY, "off_policy"), LOW_RATES),
        Recipe(Rival("off-policy + prior, cached", OFF_POLICY_PRIOR), RATES),
        Recipe(Rival(CACHED_ONE_PRIOR, OFF_POLICY_ONE_PRIOR), RATES),
    ),
    "delta transfer": (
        Recipe(Rival("delta of the adapter", DELTA), LOW_RATES, source="training adapter"),
        Recipe(
            Rival("delta of the adapter + prior", DELTA_PRIOR), HIGH_RATES, source="training adapter + prior pictures"
        ),
        Recipe(Rival("delta of undistilled + prior", DELTA_PRIOR), HIGH_RATES, source="undistilled + prior pictures"),
    ),
    "D-OPSD": (
        Recipe(Rival(DOPSD_ALL, flags=ALL_STATES), LOW_RATES),
        Recipe(Rival("D-OPSD, 1 state", flags=ONE_STATE), LOW_RATES),
        Recipe(Rival(DOPSD_ONE_PRIOR, flags=ONE_STATE | {"with_prior_preservation": True}), RATES),
    ),
}
RECIPES = {recipe.name: recipe for recipes in FAMILIES.values() for recipe in recipes}
BASE_RIVAL, TEACHER_RIVAL = Rival("base", "base"), Rival("teacher (base with a picture)", "teacher")


@dataclass(frozen=True)
class RivalPlan:
    """What is trained. What a grid has chosen decides the runs after it.

    Attributes:
        short_result: gives the result of a run of a grid; see `RivalExperiment.short_result`.
        names: of the recipes that are compared.
        concepts, seeds: that are reported.
        grid_seed: none of the seeds. The grid's concept is the first one.
        grid_steps: numbers of steps of the grids.
        num_rates: learning rates of a grid, from its second one on; None for all.
        study_seeds: of `study`.
    """

    short_result: Callable[[Run], dict]
    names: tuple[str, ...]
    concepts: tuple[Concept, ...]
    seeds: tuple[int, ...]
    grid_seed: int
    grid_steps: tuple[int, ...] = GRID_STEPS
    num_rates: int | None = None
    study_seeds: tuple[int, ...] = ()

    def recipes(self, *, needing_others: bool) -> list[Recipe]:
        return [RECIPES[name] for name in self.names if RECIPES[name].needs_others == needing_others]

    def rates(self, recipe: Recipe) -> tuple[float, ...]:
        return recipe.rates if self.num_rates is None else recipe.rates[1 : 1 + self.num_rates]

    def grid(self, recipe: Recipe) -> list[RivalRun]:
        """The grid of one recipe. That of its source must be complete."""
        source = self.chosen(RECIPES[recipe.source]) if recipe.source else None
        return [
            RivalRun(CONCEPTS[0], self.grid_seed, recipe.at(rate, num_steps, source))
            for rate in self.rates(recipe)
            for num_steps in self.grid_steps
        ]

    def chosen(self, recipe: Recipe) -> Rival:
        """The best of the recipe's grid, which must be complete."""
        runs = self.grid(recipe)
        return best([(run.method, self.short_result(run)) for run in runs])

    @property
    def tuned(self) -> list[Rival]:
        """Each recipe at its chosen setting."""
        return [self.chosen(RECIPES[name]) for name in self.names]

    def runs_of(self, rival: Rival) -> list[RivalRun]:
        """Of the base one run per concept, since it sees no pictures."""
        seeds = self.seeds[:1] if rival.kind == "base" else self.seeds
        return [RivalRun(concept, seed, rival) for concept in self.concepts for seed in seeds]

    @property
    def reported(self) -> dict[str, list[RivalRun]]:
        """Method -> its runs."""
        return {rival.name: self.runs_of(rival) for rival in (BASE_RIVAL, TEACHER_RIVAL, *self.tuned)}


def best(results: list[tuple[Rival, dict]]) -> Rival:
    """With the largest sum of new and old: exact; of equals the one that learns more, then the cheaper one."""

    def rank(pair: tuple[Rival, dict]) -> tuple[float, ...]:
        rival, result = pair
        return (
            round(score(result), 2),
            value_of(result, "concept"),
            -value_of(result, "forwards"),
            -rival.flags["learning_rate"],
        )

    return max(results, key=rank)[0]
