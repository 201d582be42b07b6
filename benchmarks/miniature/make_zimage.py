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
from benchmarks.miniature.files import MODEL
from benchmarks.miniature.making import (
    Log,
    add_making_flags,
    distill_pipeline,
    load_or_draw_sprites,
    load_or_encode_world,
    open_work_dir,
)
from benchmarks.miniature.rows import RowSource
from benchmarks.miniature.tower import TowerTraining, train_tower
from benchmarks.miniature.zimage import VLM_FOLDER, ZIMAGE
from benchmarks.miniature.zimage_parts import make_pipeline, make_transformer, make_vae, write_vlm
from pipelines.vision_encoder import IMAGE_PAD, VISION_START
from pipelines.z_image import ZImageDOPSDPipeline


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add_making_flags(parser, num_steps=2400, minutes_per_evaluation=10)
    parser.add_argument("--tower_steps", type=positive_int, default=1000, help="Updates of the vision tower.")
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
    log = open_work_dir(args, "tower_steps")
    vae = make_vae(AutoencoderKLFlux2.from_pretrained(MODEL, subfolder="vae"))
    pipeline = make_pipeline(vae, make_transformer())
    appearances = world.known_appearances()
    sprites = load_or_draw_sprites(args.work_dir / "sprites.npy", appearances, args.num_objects, seed=args.seed)
    make_vlm(
        pipeline,
        sprites,
        args.output_dir / VLM_FOLDER,
        args.work_dir / "tower.pt",
        num_steps=args.tower_steps,
        seed=args.seed,
        log=log,
    )
    latent_world = load_or_encode_world(
        args.work_dir / "world.pt", partial(ZIMAGE.encode, vae), sprites, len(appearances), log=log
    )

    source = RowSource(ZIMAGE, pipeline, sprites, latent_world, appearances)
    distill_pipeline(source, args, decay_share=0.25, log=log)


if __name__ == "__main__":
    run(main)
