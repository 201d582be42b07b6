"""Does `evaluate_lora.py` rank LoRAs as an exact reader does? On LoRAs of which it is known what they can do.

    python -m benchmarks.miniature.comparison --output_dir miniature-comparison

Trains feature models of the miniature's world (`feature_models`) and LoRAs (`known_loras`), compares these with
`evaluate_lora.py`, reads the same drawings with the miniature's exact reader, and writes tables and a plot of both.
Run the same command again to continue: what was made is kept. Less than half an hour of a core.
"""

import os


os.environ["HF_HUB_OFFLINE"] = "1"  # everything is local; set before a library reads it

import argparse
import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.miniature import comparison_report, world
from benchmarks.miniature.command_line import HelpFormatter, positive_int, run
from benchmarks.miniature.exact_figures import Asked, ExactReader, asked_prompts, files_of, read_pictures
from benchmarks.miniature.feature_models import CLIP, DINO, make_feature_models
from benchmarks.miniature.files import MODEL, REPOSITORY, make_folder, replacing
from benchmarks.miniature.klein import KLEIN
from benchmarks.miniature.known_loras import SEED, SUBJECT, make_loras
from benchmarks.miniature.mask_model import ANYTHING, MASK, make_mask_model
from benchmarks.miniature.workers import disable_progress_bars
from dopsd.errors import DOPSDError
from dopsd.evaluation.comparison import Comparison, Contender, LoRA, Role
from dopsd.evaluation.pictures import PICTURES_DIR
from dopsd.evaluation.results import RESULTS_FILE, read_results


STRENGTHS = (0.5, 1.0, 1.5)
NUM_PROMPTS: dict[Role, int] = {"concept": 3, "unrelated": 8, "neighbour": 4, "other_word": 4}
NUM_SEEDS = 16


class ComparisonFailed(DOPSDError):
    """`evaluate_lora.py` failed."""


@dataclass(frozen=True)
class Settings:
    """What is drawn.

    Attributes:
        num_prompts: of each role; there are three for the concept, one per background that no training picture has.
    """

    num_prompts: dict[Role, int]
    num_seeds: int
    strengths: tuple[float, ...] = STRENGTHS


def evaluate_flags(
    folder: Path, loras: dict[str, Path], models: Path, settings: Settings, model: Path = MODEL
) -> list[str]:
    """Flags of `evaluate_lora.py`.

    Args:
        folder: with the training pictures in "pictures" and with "prompts.json"; the comparison is written into it.
    """
    values = {
        "pretrained_model_name_or_path": [model],
        "lora": [f"{name}={path}" for name, path in loras.items()],
        "instance_data_dir": [folder / "pictures"],
        "kind": ["object"],
        "trigger_word": [SUBJECT.word],
        "class_word": [ANYTHING],
        "prompts": [folder / "prompts.json"],
        "num_seeds": [settings.num_seeds],
        "strengths": settings.strengths,
        "resolution": [world.SIDE],
        "max_sequence_length": [KLEIN.max_sequence_length],
        "mixed_precision": ["no"],
        "batch_size": [settings.num_seeds],
        "clip_model": [models / CLIP],
        "dino_model": [models / DINO],
        "mask_background": ["true"],
        "mask_model": [models / MASK],
        "output_dir": [folder / "comparison"],
    }
    return [text for name, some in values.items() for text in (f"--{name}", *map(str, some))]


def compare(
    folder: Path, loras: dict[str, Path], models: Path, settings: Settings, model: Path = MODEL
) -> tuple[Comparison, dict[str, dict[str, float]]]:
    """Runs `evaluate_lora.py`; see `evaluate_flags`. Returns what it found, and the exact figures of each contender.

    Raises:
        ComparisonFailed: it ended with an error, which it has printed.
    """
    SUBJECT.write_training_data(folder / "pictures", SEED)
    asked = asked_prompts(SUBJECT, settings.num_prompts)
    with replacing(folder / "prompts.json") as partial:
        partial.write_text(json.dumps({"prompts": [asdict(one.prompt) for one in asked]}, indent=1) + "\n")
    command = [sys.executable, str(REPOSITORY / "evaluate_lora.py")]
    finished = subprocess.run([*command, *evaluate_flags(folder, loras, models, settings, model)], check=False)
    if finished.returncode:
        raise ComparisonFailed(f"evaluate_lora.py ended with exit status {finished.returncode}")
    found = read_results(folder / "comparison" / RESULTS_FILE)
    return found, exact_figures(folder / "comparison" / PICTURES_DIR, [*loras], asked, settings)


def exact_figures(folder: Path, names: list[str], asked: list[Asked], settings: Settings) -> dict[str, dict]:
    """Contender's name -> its exact figures.

    Args:
        folder: of the comparison's pictures.
        names: of the LoRAs.
    """
    reader = ExactReader(SUBJECT, SUBJECT.pictures(SEED)[0])
    base, strengths = Contender(), sorted({1.0, *settings.strengths})
    others = [Contender((LoRA(name, Path(), ""),), strength) for name in names for strength in strengths]
    found, seen_of_base = {}, {}
    for contender in (base, *others):
        seen = {}
        for one in asked:
            if contender.strength == 1 or one.prompt.role in ("concept", "unrelated"):
                paths = files_of(folder, contender, one.prompt, settings.num_seeds)
                seen[one] = reader.see(one, read_pictures(paths))
        seen_of_base = seen_of_base or seen
        found[contender.name] = reader.figures([*seen.values()], [seen_of_base[one] for one in seen])
    return found


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("miniature-comparison"), help="Folder for everything.")
    parser.add_argument("--num_seeds", type=positive_int, default=NUM_SEEDS, help="Drawings per prompt.")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    make_folder(args.output_dir, flag="--output_dir")
    disable_progress_bars()
    os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count()))
    folder = args.output_dir.resolve()
    quality = make_feature_models(folder / "feature_models")
    quality[MASK] = make_mask_model(folder / "feature_models")
    loras = make_loras(folder / "loras")
    settings = Settings(NUM_PROMPTS, args.num_seeds)
    found, exact = compare(folder, loras, folder / "feature_models", settings)
    comparison_report.write(folder, comparison_report.results(asdict(settings), quality, found, exact))


if __name__ == "__main__":
    run(main)
