"""The methods that the experiment compares, and their runs."""

import re
import zlib
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from benchmarks.miniature.concepts import Concept


NUM_TRAIN_STEPS = 120


@dataclass(frozen=True)
class SharedSettings:
    """Settings that D-OPSD and the baselines share, named like the flags of the training script.

    The learning rate and epsilon belong together. With its usual epsilon of 1e-8, AdamW moves every weight by about
    the learning rate, including those that hardly matter for the new concept, at the cost of old prompts (see the
    ablations). The root mean square of D-OPSD's gradients is at most 5e-3 here: with this epsilon, steps follow the
    size of the gradients.

    Attributes:
        train_batch_size: of the four training pictures.
    """

    rank: int = 16
    train_batch_size: int = 2
    learning_rate: float = 4e-2
    adam_epsilon: float = 1e-2
    lr_scheduler: str = "cosine"
    lr_warmup_steps: int = 10
    ema_decay: float = 0.9999

    @property
    def lora_alpha(self) -> int:
        """The training script's default."""
        return 2 * self.rank


SHARED_FLAGS = asdict(SharedSettings())
# AdamW's default epsilon, with a learning rate that teaches as much in as many steps.
DEFAULT_EPSILON = {"adam_epsilon": 1e-8, "learning_rate": 1e-3}


@dataclass(frozen=True)
class Method:
    """A way to get a model.

    Attributes:
        kind: "base"; "teacher", the base model with a reference; "dopsd", the training script; or the name of a
            baseline (see `baselines`).
        flags: flags of the training script that differ from `SHARED_FLAGS`. A baseline has those of
            `SharedSettings` only.
        stops_at_dopsd: whether training stops when it reaches the concept accuracy of D-OPSD.
    """

    name: str
    kind: str = "dopsd"
    flags: dict = field(default_factory=dict)
    stops_at_dopsd: bool = False

    @property
    def settings(self) -> SharedSettings:
        """A baseline's settings."""
        return replace(SharedSettings(), **self.flags)


BASE, TEACHER = Method("base", "base"), Method("teacher (base with a picture)", "teacher")
SFT, DOPSD = Method("SFT", "sft"), Method("D-OPSD")
SFT_STOPPED = Method("SFT, stopped at D-OPSD's accuracy", "sft", stops_at_dopsd=True)
LIVE = Method("teacher: live", flags={"teacher": "student"})
FIRST_TABLE = (BASE, TEACHER, SFT, SFT_STOPPED, DOPSD)
ABLATIONS = (
    SFT,
    Method("SFT at the deployed sigmas", "sft_deployed"),
    Method("SFT on teacher's samples", "sft_teacher"),
    Method("off-policy", "off_policy"),
    replace(DOPSD, name="on-policy (D-OPSD: EMA 0.9999, x0)"),
    LIVE,
    Method("teacher: EMA 0.9", flags={"ema_decay": 0.9}),
    Method("teacher: EMA 0.99", flags={"ema_decay": 0.99}),
    Method("teacher: base", flags={"teacher": "base"}),
    Method("velocity loss", flags={"loss_space": "velocity"}),
    Method("D-OPSD, AdamW's own epsilon", flags=DEFAULT_EPSILON),
    Method("SFT, AdamW's own epsilon", "sft", flags=DEFAULT_EPSILON),
)
STEP_TABLE = (BASE, SFT, DOPSD)  # compared at several numbers of sampling steps


@dataclass(frozen=True)
class Run:
    """One method on one concept with one seed."""

    concept: Concept
    seed: int
    method: Method

    @property
    def folder(self) -> Path:
        """The run's folder inside the experiment's. Runs with equal settings share it, whatever the method's name."""
        method = self.method
        words = [method.kind, *(f"{name}={value}" for name, value in sorted(method.flags.items()))]
        if method.stops_at_dopsd:
            words.append("stopped")
        name = "-".join(words)
        if not re.fullmatch(r"[\w=.-]{1,60}", name):
            name = f"{method.kind}-{zlib.crc32(name.encode()):08x}"
        return Path("runs", self.concept.name, str(self.seed), name)


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
