"""LoRAs of the miniature FLUX.2-klein of which it is known what each of them can do, for `comparison`."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from PIL import Image

from benchmarks.miniature.files import MODEL
from benchmarks.miniature.methods import NUM_TRAIN_STEPS
from benchmarks.miniature.once import ADAPTER, SAMPLES
from benchmarks.miniature.rival_methods import (
    DOPSD_ALL,
    DOPSD_ONE_PRIOR,
    GRID_CONCEPT,
    RECIPES,
    REPORTED_CONCEPTS,
    SFT,
    Rival,
    RivalRun,
)
from benchmarks.miniature.rival_runs import FaultyLesson, RivalExperiment
from benchmarks.miniature.rival_study import faulty


SUBJECT = GRID_CONCEPT  # what the LoRAs are to draw, on which the rivals' settings were chosen
ANOTHER = REPORTED_CONCEPTS[1]
ONE_PICTURE = faulty("one-picture", num_pictures=1)
SEED = 0
BLURRED = "blurred"  # the training adapter, which undoes distillation, as if it was a LoRA
CHOSEN = MODEL.parent / "results" / "rivals_klein.json"


@dataclass(frozen=True)
class BareLesson(FaultyLesson):
    """A lesson whose captions leave out the background, so that the word stands for the whole picture."""

    def pictures(self, seed: int) -> tuple[list[Image.Image], list[str]]:
        images, _ = super().pictures(seed)
        return images, [f"a {self.word}"] * len(images)


BARE_PICTURE = BareLesson(**vars(replace(ONE_PICTURE, name="object-bare-picture")))


def chosen(name: str) -> Rival:
    """A method at the setting that the rivals' grid chose."""
    setting = json.loads(CHOSEN.read_text())["chosen"][name]
    return RECIPES[name].at(setting["learning_rate"], setting["steps"], setting["scale"])


def known_runs() -> dict[str, RivalRun]:
    """A LoRA's name -> how it is trained."""
    return {
        "sft": RivalRun(SUBJECT, SEED, chosen(SFT.name)),
        "dopsd": RivalRun(SUBJECT, SEED, chosen(DOPSD_ALL)),
        "dopsd-prior": RivalRun(SUBJECT, SEED, chosen(DOPSD_ONE_PRIOR)),
        "adapter": RivalRun(SUBJECT, SEED, chosen("training adapter")),
        "wrong": RivalRun(ANOTHER, SEED, chosen(DOPSD_ONE_PRIOR)),
        # Eight times as many steps on one of the four pictures.
        "one-picture": RivalRun(ONE_PICTURE, SEED, RECIPES[SFT.name].at(3e-3, 480)),
        "memorised": RivalRun(BARE_PICTURE, SEED, RECIPES[SFT.name].at(3e-3, 480)),
    }


def make_loras(folder: Path) -> dict[str, Path]:
    """Trains what the folder lacks, in up to ten minutes of a core. Returns the LoRAs' files by their names."""
    experiment = RivalExperiment(
        model=MODEL,
        folder=folder,
        num_train_steps=NUM_TRAIN_STEPS,
        steps_per_evaluation=NUM_TRAIN_STEPS,
        eval_count=16,
    )
    for part in (SAMPLES, ADAPTER):
        experiment.once.figures(part)
    loras = {}
    for name, run in known_runs().items():
        experiment.short_result(run)
        loras[name] = folder / run.folder / LORA_WEIGHT_NAME_SAFE
    return loras | {BLURRED: experiment.once.folder / ADAPTER / LORA_WEIGHT_NAME_SAFE}
