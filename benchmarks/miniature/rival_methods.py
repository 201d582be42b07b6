"""D-OPSD and its rivals, their grids, and what is chosen from these."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from typing import ClassVar

from benchmarks.miniature.architecture import Architecture
from benchmarks.miniature.concepts import CONCEPTS, Concept
from benchmarks.miniature.costs import NUM_ROLLOUT_STEPS, num_samples, sampled_cost, training_cost
from benchmarks.miniature.methods import ALL_STATES, NUM_TRAIN_STEPS, ONE_STATE, SHARED_FLAGS, Method, Run
from benchmarks.miniature.once import ADAPTER, REPAIR, UNDISTILLED
from benchmarks.miniature.tables import score, value_of


GRID_CONCEPT, REPORTED_CONCEPTS = CONCEPTS[0], CONCEPTS[1:]  # what is chosen on one is reported on the others
# Learning rates and numbers of steps of the grids. Where base or pictures hold the student, higher rates are best; SFT
# takes a quarter of the states in a step, so more steps are tried as well.
UNHELD_RATES, TRAJECTORY_RATES, PICTURE_RATES = (3e-4, 1e-3, 3e-3), (1e-3, 3e-3, 1e-2), (3e-3, 1e-2, 2e-2)
STEPS, SFT_STEPS = (60, 120, 240), (60, 120, 240, 480)
INDIFFERENCE = 0.03  # of the score: one and a half of 48 pictures
CHEAPER = ", cheaper"  # behind a method's name: at the cheapest setting within `INDIFFERENCE` of the best
NUM_TAUGHT_TRAJECTORIES = 64  # of the teacher, cached; at most
DELTA, DELTA_PRIOR = "delta", "delta_prior"
OFF_POLICY_PRIOR, OFF_POLICY_ONE_PRIOR = "off_policy_prior", "off_policy_one_prior"
MARKS = {ADAPTER: "A", UNDISTILLED: "U", REPAIR: "R"}  # in the tables, of what is trained once


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
        scale: of the repair LoRA, or of the change that delta transfer teaches.
        num_draws: flow matching draws once per picture and step, as training scripts do.
    """

    trained_on: str = ""
    source: "Rival | None" = None
    scale: float = 1.0
    num_draws: ClassVar[int] = 1

    @property
    def folder_name(self) -> str:
        parts = [super().folder_name]
        if self.trained_on:
            parts.append(f"on-{self.trained_on}")
        if self.scale != 1:
            parts.append(f"scale-{self.scale:g}")
        if self.source is not None:
            parts.append(f"of-{self.source.folder_name}")
        return "-".join(parts)

    @property
    def is_delta(self) -> bool:
        return self.kind in (DELTA, DELTA_PRIOR)

    def num_trajectories(self, num_steps: int) -> int:
        """Of the teacher, cached: no more than the training draws from."""
        return min(NUM_TAUGHT_TRAJECTORIES, num_steps * num_samples(SHARED_FLAGS | self.flags))

    def cost(self, num_steps: int, architecture: Architecture) -> float:
        """Without what is trained once."""
        if self.kind == REPAIR:
            return self.source.cost(num_steps, architecture)
        flags, costs = SHARED_FLAGS | self.flags, architecture.costs
        samples = num_steps * num_samples(flags)
        if self.kind in (OFF_POLICY_PRIOR, OFF_POLICY_ONE_PRIOR):
            num_states = NUM_ROLLOUT_STEPS if self.kind == OFF_POLICY_PRIOR else 1
            taught = self.num_trajectories(num_steps) * costs.base_teacher
            cached = NUM_ROLLOUT_STEPS * (taught + self.num_prior_pictures(num_steps) * costs.base)
            return cached + samples * 2 * num_states * costs.forward_and_backward
        if self.is_delta:
            # The teacher is the base, and the many-step model before and after.
            teachers = [3 * costs.base] + [costs.base] * (self.kind == DELTA_PRIOR)
            each = sum(sampled_cost(1, NUM_ROLLOUT_STEPS, cost, costs.forward_and_backward) for cost in teachers)
            relative_steps = self.source.relative_steps / self.relative_steps
            return self.source.cost(round(num_steps * relative_steps), architecture) + samples * each
        return training_cost(self.kind, flags, num_steps, architecture, self.num_draws)


@dataclass(frozen=True)
class RivalRun(Run):
    """A run of a `Rival`."""

    @property
    def source(self) -> "RivalRun":
        """The run whose LoRA this one uses."""
        return replace(self, method=self.method.source)


@dataclass(frozen=True)
class Recipe:
    """A row of the tables, and its grid.

    Attributes:
        rival: at no particular learning rate and number of steps.
        rates, steps, scales: of the grid.
        source: the recipe whose chosen LoRA delta transfer starts from.
    """

    rival: Rival
    rates: tuple[float, ...]
    steps: tuple[int, ...] = STEPS
    scales: tuple[float, ...] = (1.0,)
    source: str | None = None

    @property
    def name(self) -> str:
        return self.rival.name

    def at(self, learning_rate: float, num_steps: int, scale: float = 1.0, source: Rival | None = None) -> Rival:
        def tuned(rival: Rival) -> Rival:
            flags = rival.flags | {"learning_rate": learning_rate}
            return replace(rival, flags=flags, relative_steps=num_steps / NUM_TRAIN_STEPS)

        if self.rival.source is not None:  # that of a repaired LoRA is trained with the same setting
            source = tuned(self.rival.source)
        return replace(tuned(self.rival), scale=scale, source=source)

    @property
    def once_part(self) -> str:
        """What it needs of what is trained once per model; "" for nothing."""
        if self.rival.kind == REPAIR:
            return REPAIR
        return RECIPES[self.source].once_part if self.source else self.rival.trained_on

    @property
    def mark(self) -> str:
        """Of `once_part`, behind the cost in the tables."""
        return f" + {MARKS[self.once_part]}" if self.once_part else ""

    @property
    def needs_others(self) -> bool:
        """Whether other recipes' runs come first."""
        return bool(self.source or self.rival.source)


SFT, SFT_PRIOR = Rival("SFT", "sft"), Rival("SFT + prior pictures", "sft_prior")
DOPSD_ONE_PRIOR, DOPSD_ALL = "D-OPSD, 1 state + prior", "D-OPSD, all states"
CACHED_ONE_PRIOR, OFF_POLICY = "off-policy + prior, cached, 1 state", "off-policy"
UNHELD, HELD = (UNHELD_RATES, SFT_STEPS), (PICTURE_RATES, SFT_STEPS)  # grids of SFT
REPAIR_SCALES, DELTA_GRID = (0.5, 1.0), {"rates": (3e-3, 1e-2), "steps": (120, 240), "scales": (1.0, 2.0)}
# Families, in the order of the tables and plots.
FAMILIES = {
    "SFT": (
        Recipe(SFT, *UNHELD),
        Recipe(SFT_PRIOR, *HELD),
    ),
    "repair LoRA": (
        Recipe(Rival("SFT, repaired", REPAIR, source=SFT), *UNHELD, REPAIR_SCALES),
        Recipe(Rival("SFT + prior pictures, repaired", REPAIR, source=SFT_PRIOR), *HELD, REPAIR_SCALES),
    ),
    "training adapter": (
        Recipe(replace(SFT, name="training adapter", trained_on=ADAPTER), *UNHELD),
        Recipe(replace(SFT_PRIOR, name="training adapter + prior pictures", trained_on=ADAPTER), *HELD),
    ),
    "undistilled model": (
        Recipe(replace(SFT, name="undistilled", trained_on=UNDISTILLED), *UNHELD),
        Recipe(replace(SFT_PRIOR, name="undistilled + prior pictures", trained_on=UNDISTILLED), *HELD),
    ),
    "off-policy": (
        Recipe(Rival(OFF_POLICY, "off_policy"), UNHELD_RATES),
        Recipe(Rival("off-policy + prior, cached", OFF_POLICY_PRIOR), TRAJECTORY_RATES),
        Recipe(Rival(CACHED_ONE_PRIOR, OFF_POLICY_ONE_PRIOR), TRAJECTORY_RATES),
    ),
    "delta transfer": (
        Recipe(Rival("delta of the adapter", DELTA), source="training adapter", **DELTA_GRID),
        Recipe(
            Rival("delta of the adapter + prior", DELTA_PRIOR),
            source="training adapter + prior pictures",
            **DELTA_GRID,
        ),
        Recipe(
            Rival("delta of undistilled + prior", DELTA_PRIOR), source="undistilled + prior pictures", **DELTA_GRID
        ),
    ),
    "D-OPSD": (
        Recipe(Rival(DOPSD_ALL, flags=ALL_STATES), UNHELD_RATES),
        Recipe(Rival("D-OPSD, 1 state", flags=ONE_STATE), UNHELD_RATES),
        Recipe(Rival(DOPSD_ONE_PRIOR, flags=ONE_STATE | {"with_prior_preservation": True}), TRAJECTORY_RATES),
    ),
}
RECIPES = {recipe.name: recipe for recipes in FAMILIES.values() for recipe in recipes}
BASE_RIVAL, TEACHER_RIVAL = Rival("base", "base"), Rival("teacher (base with a picture)", "teacher")


@dataclass(frozen=True)
class RivalPlan:
    """What is trained. What a grid has chosen decides the runs after it.

    Attributes:
        short_result, many_step_result: of a run of a grid; see `RivalExperiment`.
        names: of the recipes that are compared.
        concepts, seeds: that are reported.
        grid_seed: none of the seeds. The grid's concept is `GRID_CONCEPT`.
        kept_rates, kept_steps: indices of the learning rates and numbers of steps of each grid that are trained.
        study_seeds: of `study`.
    """

    short_result: Callable[[Run], dict]
    many_step_result: Callable[[Run], dict]
    names: tuple[str, ...]
    concepts: tuple[Concept, ...]
    seeds: tuple[int, ...]
    grid_seed: int
    kept_rates: tuple[int, ...] = (0, 1, 2)
    kept_steps: tuple[int, ...] = (0, 1, 2, 3)
    study_seeds: tuple[int, ...] = ()

    def recipes(self, *, needing_others: bool) -> list[Recipe]:
        return [RECIPES[name] for name in self.names if RECIPES[name].needs_others == needing_others]

    @property
    def sources(self) -> list[Recipe]:
        """The recipes that delta transfer starts from."""
        return [RECIPES[source] for source in dict.fromkeys(RECIPES[name].source for name in self.names) if source]

    def grid(self, recipe: Recipe) -> list[RivalRun]:
        """The grid of one recipe. That of its source must be complete."""
        source = self.chosen_source(RECIPES[recipe.source]) if recipe.source else None
        rates = [rate for index, rate in enumerate(recipe.rates) if index in self.kept_rates]
        steps = [num_steps for index, num_steps in enumerate(recipe.steps) if index in self.kept_steps]
        settings = product(rates, steps, recipe.scales)
        return [RivalRun(GRID_CONCEPT, self.grid_seed, recipe.at(*setting, source)) for setting in settings]

    def chosen(self, recipe: Recipe, indifference: float = 0.0) -> Rival:
        """The choice from the recipe's grid, which must be complete."""
        return choice([(run.method, self.short_result(run)) for run in self.grid(recipe)], indifference)

    def chosen_source(self, recipe: Recipe) -> Rival:
        """The choice for delta transfer: by what the many-step model draws with the LoRA in many steps."""
        return choice([(run.method, self.many_step_result(run)) for run in self.grid(recipe)], INDIFFERENCE)

    @property
    def tuned(self) -> list[Rival]:
        """Each recipe at its chosen setting, and at the cheapest that is nearly as good if that is another."""
        rivals = []
        for recipe in map(RECIPES.get, self.names):
            best, cheap = self.chosen(recipe), self.chosen(recipe, INDIFFERENCE)
            rivals += [best] if best == cheap else [best, replace(cheap, name=f"{cheap.name}{CHEAPER}")]
        return rivals

    def runs_of(self, rival: Rival) -> list[RivalRun]:
        """Of the base one run per concept, since it sees no pictures."""
        seeds = self.seeds[:1] if rival.kind == "base" else self.seeds
        return [RivalRun(concept, seed, rival) for concept in self.concepts for seed in seeds]

    @property
    def base_run(self) -> RivalRun:
        """The base on what is chosen by."""
        return RivalRun(GRID_CONCEPT, self.grid_seed, BASE_RIVAL)

    @property
    def reported(self) -> dict[str, list[RivalRun]]:
        """Method -> its runs."""
        return {rival.name: self.runs_of(rival) for rival in (BASE_RIVAL, TEACHER_RIVAL, *self.tuned)}


def choice(results: list[tuple[Rival, dict]], indifference: float = 0.0) -> Rival:
    """The cheapest whose score, new + old: exact, is within `indifference` of the best one; of equals the best."""
    enough = max(score(result) for _, result in results) - indifference - 1e-6
    good = [(rival, result) for rival, result in results if score(result) >= enough]

    def rank(pair: tuple[Rival, dict]) -> tuple[float, ...]:
        rival, result = pair
        return value_of(result, "forwards"), -round(score(result), 2), rival.flags["learning_rate"]

    return min(good, key=rank)[0]
