"""Makes the miniature Z-Image-Turbo: trains a vision tower, distils the transformer, writes pipeline and Qwen3-VL.

    python -m benchmarks.miniature.make_zimage --work_dir zimage-work --output_dir zimage

Its VAE is that of the shipped miniature FLUX.2-klein. Run the same command again to continue a stopped run.
`log.jsonl` and `sheet.png` in the working folder show its progress. The output folder holds the Qwen3-VL in `vlm`, and
the pipeline as of the last evaluation.
"""

import argparse
from functools import partial
from pathlib import Path

import numpy as np
from diffusers import AutoencoderKLFlux2

from benchmarks.miniature import world
from benchmarks.miniature.command_line import HelpFormatter, positive_int, run
from benchmarks.miniature.distill import Settings, distill
from benchmarks.miniature.files import MODEL, check_settings, make_folder
from benchmarks.miniature.make import Log, evaluate_and_save, load_or_draw_sprites, load_or_encode_world
from benchmarks.miniature.metrics import PictureReader
from benchmarks.miniature.rows import RowSource
from benchmarks.miniature.tasks import standard_tasks
from benchmarks.miniature.teacher import PosteriorTeacher
from benchmarks.miniature.tower import TowerTraining, train_tower
from benchmarks.miniature.zimage import VLM_FOLDER, ZIMAGE
from benchmarks.miniature.zimage_parts import make_pipeline, make_transformer, make_vae, write_vlm
from pipelines.vision_encoder import IMAGE_PAD, VISION_START
from pipelines.z_image import ZImageDOPSDPipeline


ROWS_PER_SLOT = {"text": 5, "word": 1, "reference": 8}
NUM_OBJECTS = 4000
# The settings that a continued run must not change.
FIXED_SETTINGS = ("seed", "tower_steps", "num_steps", "muon_lr", "adamw_lr")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--work_dir", type=Path, required=True, help="Folder for training states, log and samples.")
    parser.add_argument("--output_dir", type=Path, required=True, help="Folder for the pipeline and its Qwen3-VL.")
    parser.add_argument("--seed", type=int, default=0, help="Seed for the objects, the weights and the training.")
    parser.add_argument("--tower_steps", type=positive_int, default=1000, help="Updates of the vision tower.")
    parser.add_argument("--num_steps", type=positive_int, default=2400, help="Updates of the transformer.")
    parser.add_argument("--muon_lr", type=float, default=1.2e-2, help="Peak learning rate of the transformer, Muon.")
    parser.add_argument("--adamw_lr", type=float, default=2e-3, help="Peak learning rate of the transformer, AdamW.")
    parser.add_argument("--eval_count", type=positive_int, default=48, help="Pictures per task in an evaluation.")
    parser.add_argument("--minutes_per_evaluation", type=float, default=10, help="Minutes between evaluations.")
    return parser.parse_args()


def image_prefix(pipeline: ZImageDOPSDPipeline) -> list[int]:
    """The token ids before the visual tokens."""
    ids = pipeline.tokenizer(pipeline.chat_text(VISION_START + IMAGE_PAD)).input_ids
    return ids[: ids.index(pipeline.tokenizer.convert_tokens_to_ids(IMAGE_PAD))]


def make_vlm(
    pipeline: ZImageDOPSDPipeline,
    sprites: np.ndarray,
    folder: Path,
    state_path: Path,
    *,
    num_steps: int,
    seed: int,
    log: Log,
) -> None:
    """Trains the vision tower, writes the Qwen3-VL to `folder` and gives it to the pipeline."""
    held_out = np.stack([world.sprite(appearance) for appearance in world.held_out_appearances()])
    training = TowerTraining(
        pipeline.text_encoder, image_prefix(pipeline), partial(ZIMAGE.encode, pipeline.vae), seed=seed
    )
    tower = train_tower(training, sprites, held_out, state_path, num_steps=num_steps, seed=seed, log=log)
    write_vlm(folder, pipeline.text_encoder, pipeline.tokenizer, tower)
    ZIMAGE.load_vlm(pipeline, folder)


def main() -> None:
    args = parse_args()
    work_dir = args.work_dir
    for folder, flag in ((work_dir, "--work_dir"), (args.output_dir, "--output_dir")):
        make_folder(folder, flag=flag)
    check_settings(work_dir, {name: getattr(args, name) for name in FIXED_SETTINGS}, flag="--work_dir")
    log = Log(work_dir / "log.jsonl")

    vae = make_vae(AutoencoderKLFlux2.from_pretrained(MODEL, subfolder="vae"))
    pipeline = make_pipeline(vae, make_transformer())
    appearances = world.known_appearances()
    sprites = load_or_draw_sprites(work_dir / "sprites.npy", appearances, NUM_OBJECTS, seed=args.seed)
    make_vlm(
        pipeline,
        sprites,
        args.output_dir / VLM_FOLDER,
        work_dir / "tower.pt",
        num_steps=args.tower_steps,
        seed=args.seed,
        log=log,
    )
    latent_world = load_or_encode_world(
        work_dir / "world.pt", partial(ZIMAGE.encode, vae), sprites, len(appearances), log=log
    )

    sigmas = pipeline.schedule(world.SIDE, world.SIDE, ZIMAGE.num_steps).sigmas
    teacher = PosteriorTeacher(latent_world, sigmas, num_directions=1, num_substeps=ZIMAGE.num_substeps)
    settings = Settings(
        rows_per_slot=ROWS_PER_SLOT,
        muon_lr=args.muon_lr,
        adamw_lr=args.adamw_lr,
        num_steps=args.num_steps,
        minutes_per_evaluation=args.minutes_per_evaluation,
        seed=args.seed,
        decay_share=0.25,
    )
    distill(
        RowSource(ZIMAGE, pipeline, sprites, latent_world, appearances),
        teacher,
        sigmas,
        work_dir / "distill.pt",
        settings,
        log=log,
        evaluate=partial(
            evaluate_and_save,
            pipeline=pipeline,
            tasks=standard_tasks(args.eval_count),
            reader=PictureReader(world.all_appearances()),
            sheet_path=work_dir / "sheet.png",
            output_dir=args.output_dir,
        ),
    )


if __name__ == "__main__":
    run(main)
