"""Makes the editor: distils edits, pairs and copies into the shipped miniature, beside what it knows already.

    python -m benchmarks.miniature.make_editor --work_dir editor-work

Run the same command again to continue a stopped run. `log.jsonl` and `sheet.png` in the working folder show its
progress; `transformer.safetensors` there has the weights as of the last evaluation.
"""

import argparse
from functools import partial
from pathlib import Path

import torch
from diffusers import Flux2Transformer2DModel

from benchmarks.miniature import world
from benchmarks.miniature.command_line import HelpFormatter, positive_int, run
from benchmarks.miniature.distill import Settings, distill
from benchmarks.miniature.edit_rows import EditorRowSource, make_editor_buffers
from benchmarks.miniature.edit_tasks import editor_tasks, measure_placed
from benchmarks.miniature.editor import save_editor
from benchmarks.miniature.edits import BLUE, NamelessEdits, known_edits
from benchmarks.miniature.evaluate import sample
from benchmarks.miniature.files import MODEL, check_settings, make_folder
from benchmarks.miniature.klein import KLEIN
from benchmarks.miniature.making import Log, draw_sheet, load_or_draw_sprites, load_or_encode_world
from benchmarks.miniature.metrics import PictureReader
from benchmarks.miniature.parts import NUM_STEPS
from benchmarks.miniature.tasks import Task
from benchmarks.miniature.teacher import PosteriorTeacher
from pipelines.flux2_klein import Flux2KleinDOPSDPipeline


ROWS_PER_SLOT = {"text": 2, "word": 1, "reference": 2, "edit": 6, "pair": 1, "copy": 1}
NUM_OBJECTS, NUM_NAMELESS_EDITS = 4000, 4000


def evaluate_and_save(
    transformer: torch.nn.Module,
    *,
    pipeline: Flux2KleinDOPSDPipeline,
    tasks: dict[str, Task],
    reader: PictureReader,
    work_dir: Path,
) -> dict[str, dict[str, float]]:
    """Measures the pipeline with this transformer, draws a sheet of its samples and saves its weights."""
    trained = Flux2KleinDOPSDPipeline(**pipeline.components | {"transformer": transformer}, is_distilled=True)
    pictures = {name: sample(trained, task) for name, task in tasks.items()}
    draw_sheet(tasks, pictures, work_dir / "sheet.png")
    save_editor(transformer, work_dir / "transformer.safetensors")
    return {name: measure_placed(pictures[name], task, reader) for name, task in tasks.items()}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--work_dir", type=Path, required=True, help="Folder for the training state, log and weights.")
    parser.add_argument("--seed", type=int, default=0, help="Seed for the rows.")
    parser.add_argument("--num_steps", type=positive_int, default=1100, help="Updates of the transformer.")
    parser.add_argument("--muon_lr", type=float, default=8e-3, help="Peak learning rate of Muon.")
    parser.add_argument("--adamw_lr", type=float, default=1.5e-3, help="Peak learning rate of AdamW.")
    parser.add_argument("--eval_count", type=positive_int, default=48, help="Pictures per task in an evaluation.")
    parser.add_argument("--minutes_per_evaluation", type=float, default=7, help="Minutes between evaluations.")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    work_dir = args.work_dir
    make_folder(work_dir, flag="--work_dir")
    fixed = {name: getattr(args, name) for name in ("seed", "num_steps", "muon_lr", "adamw_lr")}
    check_settings(work_dir, fixed, flag="--work_dir")
    log = Log(work_dir / "log.jsonl")

    pipeline = Flux2KleinDOPSDPipeline.from_pretrained(MODEL)
    initial = Flux2Transformer2DModel.from_pretrained(MODEL, subfolder="transformer").state_dict()
    appearances = world.known_appearances()
    sprites = load_or_draw_sprites(work_dir / "sprites.npy", appearances, NUM_OBJECTS, seed=args.seed)
    latent_world = load_or_encode_world(
        work_dir / "world.pt", partial(KLEIN.encode, pipeline.vae), sprites, len(appearances), log=log
    )
    nameless = NamelessEdits.draw([*known_edits(), BLUE], NUM_NAMELESS_EDITS, seed=args.seed)
    source = EditorRowSource(pipeline, sprites, latent_world, appearances, nameless=nameless)

    sigmas = pipeline.schedule(world.SIDE, world.SIDE, NUM_STEPS).sigmas
    teacher = PosteriorTeacher(latent_world, sigmas, num_directions=1, num_substeps=KLEIN.num_substeps)
    settings = Settings(
        rows_per_slot=ROWS_PER_SLOT,
        muon_lr=args.muon_lr,
        adamw_lr=args.adamw_lr,
        num_steps=args.num_steps,
        minutes_per_evaluation=args.minutes_per_evaluation,
        seed=args.seed,
        student_share_steps=100,
    )
    distill(
        source,
        teacher,
        sigmas,
        work_dir / "distill.pt",
        settings,
        log=log,
        evaluate=partial(
            evaluate_and_save,
            pipeline=pipeline,
            tasks=editor_tasks(args.eval_count),
            reader=PictureReader(world.all_appearances()),
            work_dir=work_dir,
        ),
        groups=make_editor_buffers(source, teacher, sigmas, ROWS_PER_SLOT),
        initial_weights=initial,
    )


if __name__ == "__main__":
    run(main)
