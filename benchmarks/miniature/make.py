"""Makes the miniature FLUX.2-klein: draws its world, trains its VAE, distils its transformer, writes the pipeline.

    python benchmarks/miniature/make.py --work_dir miniature-work --output_dir miniature

A stopped run goes on where it was when the command is given again. `log.jsonl` and `sheet.png` in the working folder
show how far it is; the output folder always holds the pipeline as last measured.
"""

import argparse
import json
import sys
import time
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
from diffusers import Flux2KleinPipeline

import world
from distill import RowSource, Settings, distill
from exam import draw_sheet, measure, sample, standard_tasks
from metrics import PictureReader
from parts import NUM_STEPS, check_settings, load_or_none, make_pipeline, make_transformer, save_state
from teacher import LatentWorld, PosteriorTeacher, encode_world
from vae import train_vae


def main() -> None:
    args = parse_args()
    work_dir = args.work_dir
    work_dir.mkdir(parents=True, exist_ok=True)
    fixed = ("seed", "vae_steps", "num_objects", "num_steps", "num_directions", "muon_lr", "adamw_lr")
    fixed += ("text_rows", "word_rows", "reference_rows")
    try:
        settings = {name: getattr(args, name) for name in fixed}
        check_settings(work_dir / "settings.json", settings, origin=f"--work_dir {work_dir}")
    except ValueError as error:
        sys.exit(str(error))
    started = time.monotonic()

    def log(figures: dict) -> None:
        line = json.dumps({"seconds": round(time.monotonic() - started), **figures})
        print(line, flush=True)
        with open(work_dir / "log.jsonl", "a") as file:
            file.write(line + "\n")

    appearances = [appearance for appearance in world.all_appearances() if not appearance.is_held_out]
    sprites = draw_sprites(appearances, args.num_objects, work_dir / "sprites.npy", seed=args.seed)
    log({"sprites": len(sprites)})
    vae = train_vae(sprites, work_dir / "vae.pt", num_steps=args.vae_steps, seed=args.seed, log=log)
    latent_world = load_world(work_dir / "world.pt")
    if latent_world is None:
        # Objects with a name on every background, the others on one each.
        count = len(world.BACKGROUNDS)
        scenes = [(index, background) for index in range(len(appearances)) for background in range(count)]
        scenes += [(index, index % count) for index in range(len(appearances), len(sprites))]
        latent_world = encode_world(vae, sprites, scenes, log=log)
        save_state(vars(latent_world), work_dir / "world.pt")

    pipeline = make_pipeline(vae, make_transformer())
    sigmas = pipeline.schedule(world.SIDE, world.SIDE, NUM_STEPS).sigmas
    teacher = PosteriorTeacher(latent_world, sigmas, num_directions=args.num_directions)
    reader = PictureReader(world.all_appearances())
    tasks = standard_tasks(args.eval_count)

    def evaluate(transformer: torch.nn.Module) -> dict:
        """Measures the pipeline with this transformer, draws its samples and writes it to `output_dir`."""
        pipeline.transformer = transformer
        pictures = {name: sample(pipeline, task) for name, task in tasks.items()}
        draw_sheet(tasks, pictures, work_dir / "sheet.png")
        Flux2KleinPipeline(**pipeline.components, is_distilled=True).save_pretrained(args.output_dir)
        return {name: measure(pictures[name], task, reader) for name, task in tasks.items()}

    source = RowSource(pipeline, sprites, latent_world, appearances)
    settings = Settings(
        per_slot={"text": args.text_rows, "word": args.word_rows, "reference": args.reference_rows},
        muon_lr=args.muon_lr,
        adamw_lr=args.adamw_lr,
        num_steps=args.num_steps,
        minutes_per_evaluation=args.minutes_per_evaluation,
        seed=args.seed,
    )
    distill(source, teacher, sigmas, work_dir / "distill.pt", settings, log=log, evaluate=evaluate)


def draw_sprites(appearances: list[world.Appearance], num_objects: int, path: Path, *, seed: int) -> np.ndarray:
    """(N, 40, 40, 4): the objects with a name, then as many without as asked for. Drawn once, kept at `path`."""
    if not path.exists():
        random = np.random.default_rng([10, seed])
        named = [world.sprite(appearance) for appearance in appearances]
        partial = path.with_suffix(".partial.npy")
        np.save(partial, np.stack(named + [world.random_sprite(random) for _ in range(num_objects)]))
        partial.replace(path)
    return np.load(path)


def load_world(path: Path) -> LatentWorld | None:
    state = load_or_none(path)
    return None if state is None else LatentWorld(**state)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work_dir", type=Path, required=True, help="States, log and samples; not for shipping.")
    parser.add_argument("--output_dir", type=Path, required=True, help="Where the pipeline is written.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num_steps", type=int, default=2200, help="Updates of the transformer.")
    parser.add_argument("--vae_steps", type=int, default=1600, help="Updates of the VAE.")
    parser.add_argument("--num_objects", type=int, default=4000, help="Objects without a name, for references.")
    parser.add_argument("--num_directions", type=int, default=1, help="See `teacher.PosteriorTeacher`.")
    parser.add_argument("--text_rows", type=int, default=5, help="Described objects, in each conveyor slot.")
    parser.add_argument("--word_rows", type=int, default=1, help="Words without meaning, in each conveyor slot.")
    parser.add_argument("--reference_rows", type=int, default=8, help="Referenced objects, in each conveyor slot.")
    parser.add_argument("--muon_lr", type=float, default=1.2e-2)
    parser.add_argument("--adamw_lr", type=float, default=2e-3)
    parser.add_argument("--eval_count", type=int, default=64, help="Pictures of each kind that are measured.")
    parser.add_argument("--minutes_per_evaluation", type=float, default=5)
    return parser.parse_args()


if __name__ == "__main__":
    main()
