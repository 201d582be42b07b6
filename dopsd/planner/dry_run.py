"""`--dry_run`: prints the plan of a run."""

import os

from accelerate import PartialState

from ..command_line import LAUNCHER_VARIABLE
from ..launch import set_up_logging
from ..model import Model
from ..settings import Settings
from .advice import suggestions
from .cards import CARDS, Card, this_card
from .plan import Planner
from .reading import read_run
from .report import report


def plan_run(settings: Settings, model: Model) -> None:
    """Prints what the run will take with these flags and this data. Loads no weight and writes nothing.

    It does not check what only the run can: `--attention_backend`, `--resume_from_checkpoint`, `--fsdp` with one
    process, and whether this machine can quantize.

    Raises:
        InputError: the run itself would refuse its flags, pictures or checkpoint.
    """
    PartialState()  # accelerate's loggers ask it which process this is
    set_up_logging()
    if int(os.environ.get("RANK", 0)) == 0:
        print("Planning; this takes up to a minute", flush=True)
        print(plan_text(settings, model))


def plan_text(settings: Settings, model: Model) -> str:
    """See `plan_run`."""
    card = chosen_card(settings)
    precision = settings.training.mixed_precision or os.environ.get(LAUNCHER_VARIABLE, "no")
    settings = settings.replace(mixed_precision=precision, seed=settings.training.seed or 0)
    run = read_run(settings, model, num_processes=int(os.environ.get("WORLD_SIZE", 1)))
    planner = Planner(run, on_gpu=card is not None, card=card)
    plan = planner.plan()
    found = {} if card is None else suggestions(planner, plan, card)
    return report(plan, card, found, model.name)


def chosen_card(settings: Settings) -> Card | None:
    """`--card`, or this machine's GPU; None to plan for its CPU."""
    name = settings.performance.card
    return this_card() if name is None else CARDS[name]
