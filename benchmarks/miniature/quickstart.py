"""The quick start: teaches the shipped miniature FLUX.2-klein a new object by D-OPSD and by SFT, and draws both.

No download and no GPU. Run `bash quickstart.sh`.
"""

import os


os.environ["HF_HUB_OFFLINE"] = "1"  # before a library reads it: nothing here is on a hub

import argparse
import shlex
import shutil
import subprocess
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

import world
from concepts import CONCEPTS, concept_task, pictures_of, write_pictures
from dopsd.sheets import save_png
from exam import MODEL
from experiment import (
    NUM_TRAIN_STEPS,
    QUICK_EVAL_COUNT,
    REPOSITORY,
    SFT,
    STEPS_PER_EXAM,
    Examiner,
    Experiment,
    Run,
    dopsd_flags,
    quiet,
)
from parts import MAX_SEQUENCE_LENGTH, NUM_STEPS
from report import concept_sheet
from train_dopsd_flux2 import positive_int


MARKER = ".made-by-quickstart"
CONCEPT, SEED = CONCEPTS[0], 0
NUM_THREADS = min(os.cpu_count(), 4)  # more slow such small matrices down
NUM_OLD_PROMPTS = 3


def main() -> None:
    args = parse_args()
    torch.set_num_threads(NUM_THREADS)
    folder = args.output_dir.resolve()
    clear(folder)
    quiet()
    pictures_dir, lora_dir, sheet_path = folder / "pictures", folder / "lora", folder / "sheet.png"
    examiner = Examiner(MODEL, QUICK_EVAL_COUNT)

    announce(f"1. Four pictures of a new object, called {CONCEPT.word!r}")
    images, captions = pictures_of(CONCEPT, SEED)
    write_pictures(pictures_dir, images, captions)
    print(f"{pictures_dir}: {', '.join(sorted(path.name for path in pictures_dir.iterdir()))}")

    announce("2. D-OPSD: the training script")
    train(pictures_dir, lora_dir, args.max_train_steps, examiner.retention_prompts)

    announce(f"3. Ordinary LoRA training (SFT) for comparison, {args.max_train_steps} steps, silent")
    comparison = Experiment(MODEL, folder, args.max_train_steps, STEPS_PER_EXAM, examiner)
    sft_run = Run(CONCEPT, SEED, SFT)
    (folder / sft_run.folder).mkdir(parents=True)
    comparison.train_baseline(sft_run)

    announce(f"4. {QUICK_EVAL_COUNT} pictures of each, and a contact sheet")
    pipelines = {
        "base": examiner.load(),
        "SFT": examiner.load(folder / sft_run.folder),
        "D-OPSD": examiner.load(lora_dir),
    }
    figures = {
        name: examiner.examine(pipeline, CONCEPT) | {"retention": examiner.retention(pipeline)}
        for name, pipeline in pipelines.items()
    }
    task = concept_task(CONCEPT, QUICK_EVAL_COUNT, references=images)
    figures["teacher"] = {"new": examiner.measure(pipelines["base"], task)}
    sheet = concept_sheet(
        CONCEPT,
        SEED,
        pipelines,
        examiner.old.prompts[:NUM_OLD_PROMPTS],
        title=f"A miniature FLUX.2-klein learns an object from four pictures, {args.max_train_steps} steps",
        captions={
            name: tuple(sheet_caption(result.get(part)) for part in ("new", "old")) for name, result in figures.items()
        },
    )
    save_png(sheet, sheet_path)
    print_report(figures, lora_dir, sheet_path)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, default=REPOSITORY / "quickstart-output", help="Is cleared first.")
    parser.add_argument("--max_train_steps", type=positive_int, default=NUM_TRAIN_STEPS)
    return parser.parse_args()


def announce(text: str) -> None:
    print(f"\n== {text}", flush=True)


def clear(folder: Path) -> None:
    """Empties the folder of an earlier quick start, and nobody else's."""
    try:
        if folder.exists() and any(folder.iterdir()) and not (folder / MARKER).exists():
            sys.exit(f"--output_dir {folder}: holds something else; choose a new or empty folder")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        (folder / MARKER).touch()
    except OSError as error:
        sys.exit(f"--output_dir {folder}: {error.strerror}; choose another folder")


def train(pictures_dir: Path, lora_dir: Path, num_steps: int, retention_prompts: list[str]) -> None:
    """The command that a user would type, on the miniature."""
    launch = ["launch", "--cpu", "--num_processes", "1", "--num_machines", "1", "--dynamo_backend", "no"]
    launch += ["--mixed_precision", "no", "--num_cpu_threads_per_process", str(NUM_THREADS)]
    launch.append(str(REPOSITORY / "train_dopsd_flux2.py"))
    flags = dopsd_flags(MODEL, pictures_dir, lora_dir, SEED, num_steps, retention_prompts)
    print(" \\\n  ".join(["accelerate " + shlex.join(launch), *map(shlex.join, flags)]), flush=True)
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", *launch, *sum(flags, [])]
    finished = subprocess.run(command, check=False)
    if finished.returncode:
        sys.exit(f"The training command above failed with exit status {finished.returncode}")


def sheet_caption(figures: dict | None) -> str:
    if figures is None:
        return ""
    places = f"{figures['poses']:.1f} of {len(world.POSES)} places"
    return f"right object in {figures['exact']:.0%} of {QUICK_EVAL_COUNT}; {places}"


def print_report(figures: dict[str, dict], lora_dir: Path, sheet_path: Path) -> None:
    print(f"{'':10}{'new object':>12}{'places':>8}{'old objects':>13}{'retention':>11}")
    for name in ("base", "teacher", "SFT", "D-OPSD"):
        new, old = figures[name]["new"], figures[name].get("old")
        line = f"{name:10}{new['exact']:12.2f}{new['poses']:8.1f}"
        print(line + (f"{old['exact']:13.2f}{figures[name]['retention']:11.2f}" if old else ""))
    prompt = world.caption(CONCEPT.word, CONCEPT.other_backgrounds[0])
    print(f"""
LoRA:    {lora_dir / "pytorch_lora_weights.safetensors"}
Picture: {sheet_path}

The LoRA in your own Python:

import torch
from diffusers import Flux2KleinPipeline
pipe = Flux2KleinPipeline.from_pretrained({str(MODEL)!r})
pipe.load_lora_weights({str(lora_dir)!r})
image = pipe(prompt={prompt!r}, height={world.SIDE}, width={world.SIDE}, num_inference_steps={NUM_STEPS},
             guidance_scale=1.0, max_sequence_length={MAX_SEQUENCE_LENGTH},
             generator=torch.Generator().manual_seed(0)).images[0]
image.save("{CONCEPT.word}.png")""")


if __name__ == "__main__":
    main()
