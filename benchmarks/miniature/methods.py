"""The methods that the experiment compares, and their runs."""

import re
import zlib
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import ClassVar

from benchmarks.miniature.architecture import Architecture
from benchmarks.miniature.concepts import Concept
from benchmarks.miniature.costs import NUM_ROLLOUT_STEPS, equal_cost_steps, num_prior_pictures, training_cost
from benchmarks.miniature.klein import KLEIN


NUM_TRAIN_STEPS = 120
# AdamW's epsilon. The usual one moves every weight by about the learning rate, including those that hardly matter
# for the new concept. The root mean square of D-OPSD's gradients is at most 5e-3 here: with the large one, steps
# follow the size of the gradients.
USUAL_EPSILON, LARGE_EPSILON = 1e-8, 1e-2
TRAIN_MODE = "train_mode"  # the flag


@dataclass(frozen=True)
class SharedSettings:
    """Settings that D-OPSD and the baselines share, named like the flags of the training script.

    Attributes:
        train_batch_size: of the four training pictures.
        learning_rate: each method of the tables has its own, see `LEARNING_RATES`.
    """

    rank: int = 16
    train_batch_size: int = 2
    learning_rate: float = 1e-3
    adam_epsilon: float = USUAL_EPSILON
    lr_scheduler: str = "cosine"
    lr_warmup_steps: int = 10
    ema_decay: float = 0.9999

    @property
    def lora_alpha(self) -> int:
        """The training script's default."""
        return 2 * self.rank


SHARED_FLAGS = asdict(SharedSettings())


@dataclass(frozen=True)
class Method:
    """A way to get a model.

    Attributes:
        kind: "base"; "teacher", the base model with a reference; "dopsd", the training script; or the name of a
            baseline (see `baselines`).
        flags: flags of the training script that differ from `SHARED_FLAGS`. A baseline has those of
            `SharedSettings` and `TRAIN_MODE` only; the teacher what `Architecture.load` takes.
        relative_steps: training steps, relative to the experiment's number.
        stops_at_dopsd: whether training stops when it reaches the concept accuracy of D-OPSD.
        prior_avoids: words that no unrelated prompt of prior preservation has.
        names_word: whether prior preservation knows the new word, and holds other made-up words.
        num_draws: flow matching's draws of noise per picture and training step: as many as D-OPSD has states.
    """

    name: str
    kind: str = "dopsd"
    flags: dict = field(default_factory=dict)
    relative_steps: float = 1.0
    stops_at_dopsd: bool = False
    prior_avoids: tuple[str, ...] = ()
    names_word: bool = True
    num_draws: ClassVar[int] = NUM_ROLLOUT_STEPS

    @property
    def settings(self) -> SharedSettings:
        """A baseline's settings."""
        return replace(SharedSettings(), **{name: value for name, value in self.flags.items() if name != TRAIN_MODE})

    @property
    def is_full(self) -> bool:
        """Whether the transformer's own weights are trained, not a LoRA."""
        return self.flags.get(TRAIN_MODE) == "full"

    @property
    def is_trained(self) -> bool:
        return self.kind not in ("base", "teacher")

    def num_steps(self, usual: int) -> int:
        return round(usual * self.relative_steps)

    def cost(self, num_steps: int, architecture: Architecture) -> float:
        """In forward passes of the student; see `costs`."""
        return training_cost(self.kind, SHARED_FLAGS | self.flags, num_steps, architecture, self.num_draws)

    def num_prior_pictures(self, num_steps: int) -> int:
        """Pictures that the base draws for prior preservation, where pictures are held."""
        return num_prior_pictures(SHARED_FLAGS | self.flags, num_steps, self.num_draws)

    @property
    def folder_name(self) -> str:
        """Equal for methods with equal settings, whatever their names."""
        words = [self.kind, *(f"{name}={value}" for name, value in sorted(self.flags.items()))]
        defaults = Method("", "")
        words += [
            f"{name}={getattr(self, name)}"
            for name in ("relative_steps", "stops_at_dopsd", "prior_avoids", "names_word")
            if getattr(self, name) != getattr(defaults, name)
        ]
        name = "-".join(words)
        return name if re.fullmatch(r"[\w=.-]{1,60}", name) else f"{self.kind}-{zlib.crc32(name.encode()):08x}"

    def at_cost(self, cost: float, architecture: Architecture) -> "Method":
        """The same with as many training steps as `cost` allows."""
        num_steps = equal_cost_steps(self.kind, SHARED_FLAGS | self.flags, cost, architecture)
        return replace(self, relative_steps=num_steps / NUM_TRAIN_STEPS)


ALL_STATES = {"num_trained_states": 4, "with_prior_preservation": False}  # the published method
ONE_STATE = ALL_STATES | {"num_trained_states": 1}
PRIOR = ALL_STATES | {"with_prior_preservation": True}
RECIPES = (
    Method("SFT", "sft"),
    Method("SFT + prior pictures", "sft_prior"),
    Method("D-OPSD", flags=ALL_STATES),
    Method("D-OPSD, one state", flags=ONE_STATE),
    Method("D-OPSD + prior", flags=PRIOR),
    Method("D-OPSD, one state + prior", flags=ONE_STATE | {"with_prior_preservation": True}),
)
# Chosen from `LEARNING_RATE_GRIDS`; the report has what each of them gave.
LEARNING_RATES = {
    USUAL_EPSILON: (1e-3, 1e-2, 1e-3, 1e-3, 3e-3, 3e-3),
    LARGE_EPSILON: (8e-2, 8e-2, 4e-2, 2e-2, 1.6e-1, 8e-2),
}
LEARNING_RATE_GRIDS = {USUAL_EPSILON: (3e-4, 1e-3, 3e-3, 1e-2, 3e-2), LARGE_EPSILON: (2e-2, 4e-2, 8e-2, 1.6e-1)}


def with_rate(recipe: Method, epsilon: float, learning_rate: float) -> Method:
    return replace(recipe, flags=recipe.flags | {"adam_epsilon": epsilon, "learning_rate": learning_rate})


def tuned(epsilon: float) -> tuple[Method, ...]:
    """The recipes with AdamW's epsilon and the learning rate that was chosen for it."""
    pairs = zip(RECIPES, LEARNING_RATES[epsilon], strict=True)
    return tuple(with_rate(recipe, epsilon, rate) for recipe, rate in pairs)


def learning_rate_grid(epsilon: float, rates: tuple[float, ...]) -> tuple[Method, ...]:
    """Every recipe with every learning rate."""
    return tuple(
        replace(with_rate(recipe, epsilon, rate), name=f"{recipe.name} | {rate:g}")
        for recipe in RECIPES
        for rate in rates
    )


def variant(name: str, of: Method, **flags: object) -> Method:
    return replace(of, name=name, flags=of.flags | flags)


BASE, TEACHER = Method("base", "base"), Method("teacher (base with a picture)", "teacher")
SFT, SFT_PRIOR, DOPSD, DOPSD_ONE, DOPSD_PRIOR, DOPSD_BOTH = tuned(USUAL_EPSILON)
SFT_STOPPED = replace(SFT, name="SFT, stopped at D-OPSD's accuracy", stops_at_dopsd=True)
# Not chosen by the grid, whose criterion leaves out wrong words; prior preservation allows higher rates.
DOPSD_BOTH_FAST = variant("D-OPSD, one state + prior, at 1e-2", DOPSD_BOTH, learning_rate=1e-2)
FIRST_TABLE = (
    *(BASE, TEACHER, SFT, SFT_STOPPED, SFT_PRIOR),
    *(DOPSD, DOPSD_ONE, DOPSD_PRIOR, DOPSD_BOTH, DOPSD_BOTH_FAST),
)
QUICK_TABLE = (BASE, TEACHER, SFT, SFT_STOPPED, DOPSD, DOPSD_BOTH)
LARGE_EPSILON_TABLE = tuned(LARGE_EPSILON)
EQUAL_COST_TABLE = (
    DOPSD,
    *(
        method.at_cost(DOPSD.cost(NUM_TRAIN_STEPS, KLEIN), KLEIN)
        for method in (SFT, SFT_PRIOR, DOPSD_ONE, DOPSD_PRIOR, DOPSD_BOTH)
    ),
)
LONG_BOTH = replace(DOPSD_BOTH, name="D-OPSD, one state + prior, twice the steps", relative_steps=2.0)

# How states are sampled. The first two are trained in the same way but for the states' probabilities.
SAMPLING_TABLE = (
    DOPSD,
    DOPSD_ONE,
    variant("two states", DOPSD, num_trained_states=2),
    variant("one state for each sample", DOPSD_ONE, train_batch_size=1, gradient_accumulation_steps=2),
    variant("one state for each sample, 6 samples", DOPSD_ONE, train_batch_size=2, gradient_accumulation_steps=3),
    replace(DOPSD_ONE, name="one state, in the benchmark's own loop", kind="one_state", flags=SFT.flags),
    replace(DOPSD_ONE, name="one state, drawn by gradient norm", kind="one_state_by_norm", flags=SFT.flags),
)
PRIOR_TABLE = (
    DOPSD_BOTH,
    LONG_BOTH,
    replace(DOPSD_BOTH, name="prior without made-up words", names_word=False),
    variant("prior every second step, weight 2", DOPSD_BOTH, prior_every=2, prior_loss_weight=2),
    replace(DOPSD_BOTH, name="prior prompts of three shapes", prior_avoids=("triangle", "cross", "ring")),
)

# For a concept that needs what prior preservation holds.
RENAMING_TABLE = (
    BASE,
    DOPSD_ONE,
    replace(DOPSD_BOTH, names_word=False),
    replace(DOPSD_BOTH, name="the same, no prior prompt has the word", names_word=False, prior_avoids=("dotted",)),
)

AT_LARGE_EPSILON = {"adam_epsilon": LARGE_EPSILON, "learning_rate": 4e-2}
PUBLISHED = Method("on-policy (D-OPSD: EMA 0.9999, x0)", flags=ALL_STATES | AT_LARGE_EPSILON)
LIVE = variant("teacher: live", PUBLISHED, teacher="student")
ABLATIONS = (
    Method("SFT", "sft", AT_LARGE_EPSILON),
    Method("SFT at the deployed sigmas", "sft_deployed", AT_LARGE_EPSILON),
    Method("SFT on teacher's samples", "sft_teacher", AT_LARGE_EPSILON),
    Method("off-policy", "off_policy", AT_LARGE_EPSILON),
    PUBLISHED,
    LIVE,
    variant("teacher: EMA 0.9", PUBLISHED, ema_decay=0.9),
    variant("teacher: EMA 0.99", PUBLISHED, ema_decay=0.99),
    variant("teacher: base", PUBLISHED, teacher="base"),
    variant("velocity loss", PUBLISHED, loss_space="velocity"),
)
STEP_TABLE = (BASE, SFT, DOPSD, DOPSD_BOTH)  # compared at several numbers of sampling steps


@dataclass(frozen=True)
class Run:
    """One method on one concept with one seed."""

    concept: Concept
    seed: int
    method: Method

    @property
    def folder(self) -> Path:
        """The run's folder inside the experiment's. Runs with equal settings share it."""
        return Path("runs", self.concept.name, str(self.seed), self.method.folder_name)


def runs_of(method: Method, concepts: tuple[Concept, ...], seeds: tuple[int, ...]) -> list[Run]:
    """One run per concept and seed; for the base model, which sees no pictures, one per concept."""
    return [
        Run(concept, seed, method) for concept in concepts for seed in (seeds[:1] if method.kind == "base" else seeds)
    ]


RunsByMethod = dict[str, list[Run]]  # the name of each method and its runs


def runs_by_method(methods: tuple[Method, ...], concepts: tuple[Concept, ...], seeds: tuple[int, ...]) -> RunsByMethod:
    return {method.name: runs_of(method, concepts, seeds) for method in methods}


def all_runs(*groups: RunsByMethod) -> list[Run]:
    """The runs of all groups; runs with equal settings count once."""
    return list({run.folder: run for group in groups for runs in group.values() for run in runs}.values())
