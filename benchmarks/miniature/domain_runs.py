"""The runs that teach a domain: methods, learning rates, and which of them are compared."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from benchmarks.miniature.domains import DOMAIN
from benchmarks.miniature.methods import (
    ALL_STATES,
    BASE,
    ONE_STATE,
    TEACHER,
    TRAIN_MODE,
    Method,
    Run,
    RunsByMethod,
    all_runs,
    runs_by_method,
    variant,
)


FULL, LORA = "full", "lora"
MODE_NAMES = {FULL: "whole model", LORA: "LoRA"}
SEEDS = (0, 1, 2)
GRID_SEED = 3  # none of the tables'
RATES = {FULL: (1e-4, 3e-4, 1e-3, 3e-3), LORA: (1e-3, 3e-3, 1e-2)}
PUBLISHED, DEFAULT = "D-OPSD", "D-OPSD, one state + prior (the default)"
RECIPES = (
    Method("SFT", "sft"),
    Method(PUBLISHED, flags=ALL_STATES),
    Method(DEFAULT, flags=ONE_STATE | {"with_prior_preservation": True}),
)
BATCH = {"train_batch_size": 4}
# As many as it takes to train each of the 4 states as often as the published method does.
LONG = 4


def recipe_in_mode(recipe: Method, mode: str, rate: float) -> Method:
    """The recipe as a method that trains in this mode at this learning rate."""
    flags = BATCH | {"learning_rate": rate} | ({TRAIN_MODE: mode} if mode != LORA else {})
    return variant(f"{recipe.name}, {MODE_NAMES[mode]}", recipe, **flags)


@dataclass(frozen=True)
class DomainComparison:
    """What is trained. The learning rates of the compared runs follow from the results of the grid's.

    Attributes:
        result: gives a run's result.
        modes: `FULL`, `LORA` or both.
    """

    result: Callable[[Run], dict]
    modes: tuple[str, ...]
    seeds: tuple[int, ...]
    grid_seed: int = GRID_SEED

    def grid_in(self, mode: str) -> dict[str, dict[float, Run]]:
        """Method -> learning rate -> run."""
        grid = {}
        for recipe in RECIPES:
            methods = {rate: recipe_in_mode(recipe, mode, rate) for rate in RATES[mode]}
            grid[methods[RATES[mode][0]].name] = {
                rate: Run(DOMAIN, self.grid_seed, method) for rate, method in methods.items()
            }
        return grid

    @property
    def grid(self) -> dict[str, dict[float, Run]]:
        """Of all modes."""
        return {name: by_rate for mode in self.modes for name, by_rate in self.grid_in(mode).items()}

    @property
    def grid_runs(self) -> list[Run]:
        return [run for by_rate in self.grid.values() for run in by_rate.values()]

    @property
    def chosen_rates(self) -> dict[str, float]:
        """Of each method."""
        return {
            name: best_rate({rate: self.result(run) for rate, run in by_rate.items()})
            for name, by_rate in self.grid.items()
        }

    @property
    def by_method(self) -> RunsByMethod:
        """Base, teacher and the methods at their chosen rates, with their runs; the default also with more steps."""
        trained = [self.grid[name][rate].method for name, rate in self.chosen_rates.items()]
        for place, method in reversed([*enumerate(trained)]):
            if method.name.startswith(DEFAULT):
                longer = replace(method, name=f"{method.name}, {LONG} times the steps", relative_steps=LONG)
                trained.insert(place + 1, longer)
        teacher = replace(TEACHER, name="teacher (base with a picture of what is asked for)")
        return runs_by_method((BASE, teacher, *trained), (DOMAIN,), self.seeds)

    @property
    def runs(self) -> list[Run]:
        return all_runs(self.by_method)


def score(result: dict) -> float:
    """What learning rates are chosen by."""
    return result["new"]["whole"] + result["old"]["ordinary"]


def best_rate(by_rate: dict[float, dict]) -> float:
    """The learning rate with the best score; of equals the one that learns more, then the smaller one."""
    return max(by_rate, key=lambda rate: (round(score(by_rate[rate]), 2), by_rate[rate]["new"]["whole"], -rate))
