"""What the commands that make miniatures share: flags, log, world, distillation, sheet."""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from benchmarks.miniature import world
from benchmarks.miniature.architectures import architecture_of
from benchmarks.miniature.command_line import positive_int
from benchmarks.miniature.distill import Settings, distill
from benchmarks.miniature.evaluate import measure, sample
from benchmarks.miniature.files import check_settings, make_folder, replacing
from benchmarks.miniature.metrics import PictureReader
from benchmarks.miniature.rows import RowSource
from benchmarks.miniature.tasks import Task, reference_columns, standard_tasks
from benchmarks.miniature.teacher import LatentWorld, PosteriorTeacher, encode_world
from benchmarks.miniature.training import load_or_none, save_state


def add_making_flags(parser: argparse.ArgumentParser, *, num_steps: int, minutes_per_evaluation: float) -> None:
    """Flags that the commands share; the arguments are defaults."""
    parser.add_argument(
        "--work_dir", type=Path, required=True, help="Folder for training states, the log and samples."
    )
    parser.add_argument("--output_dir", type=Path, required=True, help="Folder for the pipeline.")
    parser.add_argument("--seed", type=int, default=0, help="Seed for the objects, the weights and the training.")
    parser.add_argument("--num_objects", type=positive_int, default=4000, help="Objects without a name.")
    parser.add_argument("--num_steps", type=positive_int, default=num_steps, help="Updates of the transformer.")
    parser.add_argument("--text_rows", type=positive_int, default=5, help="Rows per slot with a described object.")
    parser.add_argument("--word_rows", type=positive_int, default=1, help="Rows per slot with a nonsense word.")
    parser.add_argument("--reference_rows", type=positive_int, default=8, help="Rows per slot with a picture.")
    parser.add_argument(
        "--num_directions", type=positive_int, default=1, help="Directions of a token that choose the teacher's place."
    )
    parser.add_argument("--muon_lr", type=float, default=1.2e-2, help="Peak learning rate of the transformer, Muon.")
    parser.add_argument("--adamw_lr", type=float, default=2e-3, help="Peak learning rate of the transformer, AdamW.")
    parser.add_argument("--eval_count", type=positive_int, default=64, help="Pictures per task in an evaluation.")
    parser.add_argument(
        "--minutes_per_evaluation",
        type=float,
        default=minutes_per_evaluation,
        help="Minutes between evaluations.",
    )


# Of these flags, the ones that a continued run must not change.
FIXED_FLAGS = (
    *("seed", "num_objects", "num_steps", "num_directions", "muon_lr", "adamw_lr"),
    *("text_rows", "word_rows", "reference_rows"),
)


def open_work_dir(args: argparse.Namespace, *more_fixed_flags: str) -> "Log":
    """Makes the folders of a new run, or checks that a continued one has the same settings. Returns its log.

    Args:
        args: of a parser with `add_making_flags`.
        more_fixed_flags: that a continued run must not change.

    Raises:
        InputError: a folder cannot be made, or a setting has changed.
    """
    for folder, flag in ((args.work_dir, "--work_dir"), (args.output_dir, "--output_dir")):
        make_folder(folder, flag=flag)
    fixed = {name: getattr(args, name) for name in (*FIXED_FLAGS, *more_fixed_flags)}
    check_settings(args.work_dir, fixed, flag="--work_dir")
    return Log(args.work_dir / "log.jsonl")


class Log:
    """Prints metrics and appends them to a file, one JSON object per line, with the seconds since the start."""

    def __init__(self, path: Path):
        self.path, self.started = path, time.monotonic()

    def __call__(self, figures: dict) -> None:
        line = json.dumps({"seconds": round(time.monotonic() - self.started), **figures})
        print(line, flush=True)
        with open(self.path, "a") as file:
            file.write(line + "\n")


def load_or_draw_sprites(
    path: Path, appearances: list[world.Appearance], num_unnamed: int, *, seed: int
) -> np.ndarray:
    """(N, 40, 40, 4): the objects with a name, followed by `num_unnamed` without. Drawn once and kept at `path`."""
    if not path.exists():
        rng = np.random.default_rng([10, seed])
        sprites = [world.sprite(appearance) for appearance in appearances]
        sprites += [world.random_sprite(rng) for _ in range(num_unnamed)]
        with replacing(path) as partial_path:
            np.save(partial_path, np.stack(sprites))
    return np.load(path)


def load_or_encode_world(
    path: Path,
    encode: Callable[[torch.Tensor], torch.Tensor],
    sprites: np.ndarray,
    num_named: int,
    *,
    log: Callable[[dict], None],
) -> LatentWorld:
    """Scenes of the objects with a name on every background, and of the others on one each. Kept at `path`."""
    state = load_or_none(path)
    if state is None:
        num_backgrounds = len(world.BACKGROUNDS)
        scenes = [(index, background) for index in range(num_named) for background in range(num_backgrounds)]
        scenes += [(index, index % num_backgrounds) for index in range(num_named, len(sprites))]
        state = vars(encode_world(encode, sprites, scenes, log=log))
        save_state(state, path)
    return LatentWorld(**state)


def evaluate_and_save(
    transformer: torch.nn.Module,
    *,
    pipeline: DiffusionPipeline,
    tasks: dict[str, Task],
    reader: PictureReader,
    sheet_path: Path,
    output_dir: Path,
) -> dict[str, dict[str, float]]:
    """Measures the pipeline with this transformer, draws a sheet of its samples and writes it to `output_dir`."""
    with using_transformer(pipeline, transformer):
        pictures = {name: sample(pipeline, task) for name, task in tasks.items()}
        draw_sheet(tasks, pictures, sheet_path)
        save_stock_pipeline(pipeline, output_dir)
    return {name: measure(pictures[name], task, reader) for name, task in tasks.items()}


@contextmanager
def using_transformer(pipeline: DiffusionPipeline, transformer: torch.nn.Module) -> Iterator[None]:
    """The pipeline has this transformer in the meantime."""
    original, pipeline.transformer = pipeline.transformer, transformer
    try:
        yield
    finally:
        pipeline.transformer = original


def save_stock_pipeline(pipeline: DiffusionPipeline, folder: Path) -> None:
    """Writes the pipeline as one of diffusers' own class."""
    architecture = architecture_of(pipeline)
    stock = architecture.stock_pipeline_class(**pipeline.components, **architecture.pipeline_options)
    stock.save_pretrained(folder)


def draw_sheet(tasks: dict[str, Task], pictures: dict[str, torch.Tensor], path: Path, *, columns: int = 16) -> None:
    """Writes a sheet with one row of samples per task, above rows of its references if it has any; scaled by 2."""
    rows = []
    for name, task in tasks.items():
        rows.append(_strip(pictures[name][:columns].permute(0, 2, 3, 1).numpy()))
        for images in reference_columns(task.references):
            rows.append(_strip(np.stack([np.asarray(image) for image in images[:columns]]) / 127.5 - 1))
    sheet = world.to_image(np.concatenate(rows))
    sheet.resize((sheet.width * 2, sheet.height * 2), Image.Resampling.NEAREST).save(path)


def _strip(pictures: np.ndarray) -> np.ndarray:
    """(N, 64, 64, 3) pictures next to each other, each with a white border: (66, 66 N, 3)."""
    return np.concatenate(np.pad(pictures, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=1), 1)


def distill_pipeline(source: RowSource, args: argparse.Namespace, *, decay_share: float, log: Log) -> None:
    """Distils the closed-form teacher into the source's pipeline, and writes it at each evaluation.

    Args:
        args: of a parser with `add_making_flags`.
        decay_share: see `Settings`.
    """
    architecture, pipeline = source.architecture, source.pipeline
    sigmas = pipeline.schedule(world.SIDE, world.SIDE, architecture.num_steps).sigmas
    teacher = PosteriorTeacher(
        source.latents, sigmas, num_directions=args.num_directions, num_substeps=architecture.num_substeps
    )
    settings = Settings(
        rows_per_slot={"text": args.text_rows, "word": args.word_rows, "reference": args.reference_rows},
        muon_lr=args.muon_lr,
        adamw_lr=args.adamw_lr,
        num_steps=args.num_steps,
        minutes_per_evaluation=args.minutes_per_evaluation,
        seed=args.seed,
        decay_share=decay_share,
    )
    evaluate = partial(
        evaluate_and_save,
        pipeline=pipeline,
        tasks=standard_tasks(args.eval_count),
        reader=PictureReader(world.all_appearances()),
        sheet_path=args.work_dir / "sheet.png",
        output_dir=args.output_dir,
    )
    distill(source, teacher, sigmas, args.work_dir / "distill.pt", settings, log=log, evaluate=evaluate)
