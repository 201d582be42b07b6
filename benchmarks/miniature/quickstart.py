"""The quick start: teaches a shipped miniature a new object with D-OPSD and with SFT, and draws what both learned.

Run it with `bash quickstart.sh`. It needs no GPU and downloads no model.
"""

import os


os.environ["HF_HUB_OFFLINE"] = "1"  # everything is local; set before a library reads it

import argparse
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from benchmarks.miniature import methods, world, zimage_methods
from benchmarks.miniature.architecture import Architecture
from benchmarks.miniature.architectures import ARCHITECTURES
from benchmarks.miniature.command_line import HelpFormatter, positive_int, run
from benchmarks.miniature.concepts import CONCEPTS, concept_task, training_pictures, wrong_word_task
from benchmarks.miniature.files import REPOSITORY, make_folder
from benchmarks.miniature.methods import NUM_TRAIN_STEPS, Method, Run
from benchmarks.miniature.plots import concept_sheet
from benchmarks.miniature.runs import Experiment, TrainingFailed, dopsd_flags, prior_flags
from benchmarks.miniature.workers import disable_progress_bars
from dopsd.errors import InputError
from dopsd.sheets import save_png


# SFT and D-OPSD of each miniature.
METHODS = {
    "klein": (methods.SFT, methods.DOPSD_BOTH_FAST),
    "zimage": (zimage_methods.SFT, zimage_methods.DOPSD_BOTH_FAST),
}
MARKER = ".made-by-quickstart"
CONCEPT, SEED = CONCEPTS[0], 0
EVAL_COUNT = 48  # pictures per task
NUM_OLD_PROMPTS = 2  # on the sheet
NUM_THREADS = min(os.cpu_count(), 4)  # more threads slow such small matrices down


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=HelpFormatter)
    parser.add_argument(
        "--model",
        choices=ARCHITECTURES,
        default="klein",
        help="Which miniature: FLUX.2-klein with the teacher that gets a picture to edit, or Z-Image-Turbo with the "
        "teacher that sees it through Qwen3-VL.",
    )
    parser.add_argument(
        "--output_dir",
        type=Path,
        default=REPOSITORY / "quickstart-output",
        help="Folder for pictures, LoRAs and the sheet. An earlier quick start's files in it are deleted. Default: "
        "quickstart-output in the repository.",
    )
    parser.add_argument(
        "--max_train_steps",
        type=positive_int,
        default=NUM_TRAIN_STEPS,
        help="Training steps of both methods.",
    )
    return parser.parse_args()


def announce(text: str) -> None:
    print(f"\n== {text}", flush=True)


def clear(folder: Path) -> None:
    """Empties the folder of an earlier quick start, or creates it.

    Raises:
        InputError: the folder holds something else, or cannot be written.
    """
    try:
        if folder.exists() and any(folder.iterdir()) and not (folder / MARKER).exists():
            raise InputError(f"--output_dir {folder}: holds other files; choose a new or empty folder")
    except OSError as error:
        raise InputError(f"--output_dir {folder}: {error.strerror}; choose another folder") from error
    shutil.rmtree(folder, ignore_errors=True)
    make_folder(folder, flag="--output_dir")
    (folder / MARKER).touch()


def train_dopsd(
    architecture: Architecture,
    method: Method,
    pictures_dir: Path,
    lora_dir: Path,
    num_steps: int,
    retention_prompts: list[str],
) -> None:
    """Prints and runs the command that a user would type.

    Raises:
        TrainingFailed: the command failed.
    """
    launch = ["launch", "--cpu", "--num_processes", "1", "--num_machines", "1", "--dynamo_backend", "no"]
    launch += ["--mixed_precision", "no", "--num_cpu_threads_per_process", str(NUM_THREADS), str(architecture.script)]
    flags = dopsd_flags(
        architecture.folder,
        pictures_dir,
        lora_dir,
        seed=SEED,
        num_steps=num_steps,
        retention_prompts=retention_prompts,
        **CONCEPT.training_flags,
        **prior_flags(method, CONCEPT, pictures_dir.parent),
        **method.flags,
    )
    print(" \\\n  ".join(["accelerate " + shlex.join(launch), *map(shlex.join, flags)]), flush=True)
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", *launch, *sum(flags, [])]
    finished = subprocess.run(command, check=False)
    if finished.returncode:
        raise TrainingFailed(f"The training command above failed with exit status {finished.returncode}")


def measure(experiment: Experiment, pipelines: dict[str, DiffusionPipeline]) -> dict[str, dict]:
    """Metrics of base, SFT, D-OPSD, and of the teacher on the new object."""
    evaluator = experiment.evaluator
    figures = {
        name: evaluator.evaluate(pipeline, CONCEPT) | evaluator.evaluate_leaks(pipeline, CONCEPT)
        for name, pipeline in pipelines.items()
    }
    images, _ = training_pictures(CONCEPT, SEED)
    task = concept_task(CONCEPT, EVAL_COUNT, references=images)
    return figures | {"teacher": {"new": evaluator.measure(pipelines["base"], task)}}


def sheet_captions(figures: dict[str, dict]) -> tuple[str, str]:
    """Of a column: below the new object's pictures, and below the others."""
    new = figures["new"]
    places = f"{new['poses']:.1f} of {len(world.POSES)} places"
    new_caption = f"right object in {new['exact']:.0%} of {EVAL_COUNT}; {places}"
    if "old" not in figures:
        return new_caption, ""
    old, wrong = (figures[task]["exact"] for task in ("old", "wrong_words"))
    return new_caption, f"old: {old:.0%} right; wrong words: {wrong:.0%}"


def print_results(architecture: Architecture, figures: dict[str, dict], lora_dir: Path, sheet_path: Path) -> None:
    print(
        f"{'right':10}{'new object':>12}{'places':>8}{'old objects':>13}{'objects like it':>17}{'by wrong words':>16}"
    )
    for name in ("base", "teacher", "SFT", "D-OPSD"):
        line = f"{name:10}{figures[name]['new']['exact']:12.2f}{figures[name]['new']['poses']:8.1f}"
        if "old" in figures[name]:
            old, like, wrong = (figures[name][task]["exact"] for task in ("old", "neighbours", "wrong_words"))
            line += f"{old:13.2f}{like:17.2f}{wrong:16.2f}"
        print(line)
    prompt, stock = (
        world.caption(CONCEPT.word, CONCEPT.other_backgrounds[0]),
        architecture.stock_pipeline_class.__name__,
    )
    print(f"""
LoRA:    {lora_dir / "pytorch_lora_weights.safetensors"}
Picture: {sheet_path}

To use the LoRA in your own Python:

import torch
from diffusers import {stock}
pipe = {stock}.from_pretrained({str(architecture.folder)!r})
pipe.load_lora_weights({str(lora_dir)!r})
image = pipe(prompt={prompt!r}, height={world.SIDE}, width={world.SIDE}, num_inference_steps={architecture.num_steps},
             guidance_scale={architecture.guidance_scale}, max_sequence_length={architecture.max_sequence_length},
             generator=torch.Generator().manual_seed(0)).images[0]
image.save("{CONCEPT.word}.png")""")


def main() -> None:
    args = parse_args()
    torch.set_num_threads(NUM_THREADS)
    disable_progress_bars()
    folder, num_steps = args.output_dir.resolve(), args.max_train_steps
    pictures_dir, lora_dir, sheet_path = folder / "pictures", folder / "lora", folder / "sheet.png"
    clear(folder)
    architecture, (sft, dopsd) = ARCHITECTURES[args.model], METHODS[args.model]
    experiment = Experiment(
        architecture.folder, folder, num_steps, steps_per_evaluation=num_steps, eval_count=EVAL_COUNT
    )
    evaluator = experiment.evaluator

    announce(f"1. Four pictures of a new object, called {CONCEPT.word!r}")
    CONCEPT.write_training_data(pictures_dir, SEED)
    print(f"{pictures_dir}: {', '.join(sorted(path.name for path in pictures_dir.iterdir()))}")

    announce("2. D-OPSD: the training script")
    train_dopsd(architecture, dopsd, pictures_dir, lora_dir, num_steps, evaluator.retention_prompts)

    announce(f"3. Ordinary LoRA training (SFT) for comparison: {num_steps} steps, without progress messages")
    sft_run = Run(CONCEPT, SEED, sft)
    (folder / sft_run.folder).mkdir(parents=True)
    experiment.train_baseline(sft_run)

    announce(f"4. {EVAL_COUNT} pictures for each measurement, and a contact sheet")
    pipelines = {
        "base": evaluator.load(),
        "SFT": experiment.load(sft_run),
        "D-OPSD": evaluator.load(lora_dir),
    }
    figures = measure(experiment, pipelines)
    sheet = concept_sheet(
        CONCEPT,
        SEED,
        pipelines,
        [*evaluator.old.prompts[:NUM_OLD_PROMPTS], *wrong_word_task(CONCEPT, 1).prompts],
        title=f"A miniature {architecture.title} learns an object from four pictures, {num_steps} steps",
        captions={name: sheet_captions(column) for name, column in figures.items()},
    )
    save_png(sheet, sheet_path)
    print_results(architecture, figures, lora_dir, sheet_path)
    if num_steps < NUM_TRAIN_STEPS / 2:
        print(
            f"\n--max_train_steps {num_steps}: too few to learn the object, so the comparison means nothing yet; "
            f"leave it at {NUM_TRAIN_STEPS}"
        )


if __name__ == "__main__":
    run(main)
