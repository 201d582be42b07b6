"""Makes the miniature FLUX.2-klein: draws its world, trains its VAE, distils its transformer, writes the pipeline.

    python -m benchmarks.miniature.make --work_dir miniature-work --output_dir miniature

Run the same command again to continue a stopped run. `log.jsonl` and `sheet.png` in the working folder show its
progress; the output folder holds the pipeline as of the last evaluation.
"""

import argparse
from functools import partial

from benchmarks.miniature import world
from benchmarks.miniature.command_line import HelpFormatter, positive_int, run
from benchmarks.miniature.klein import KLEIN
from benchmarks.miniature.making import (
    add_making_flags,
    distill_pipeline,
    load_or_draw_sprites,
    load_or_encode_world,
    open_work_dir,
)
from benchmarks.miniature.parts import make_pipeline, make_transformer
from benchmarks.miniature.rows import RowSource
from benchmarks.miniature.vae import train_vae


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add_making_flags(parser, num_steps=2200, minutes_per_evaluation=5)
    parser.add_argument("--vae_steps", type=positive_int, default=1600, help="Updates of the VAE.")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    log = open_work_dir(args, "vae_steps")
    appearances = world.known_appearances()
    sprites = load_or_draw_sprites(args.work_dir / "sprites.npy", appearances, args.num_objects, seed=args.seed)
    log({"sprites": len(sprites)})
    vae = train_vae(sprites, args.work_dir / "vae.pt", num_steps=args.vae_steps, seed=args.seed, log=log)
    latent_world = load_or_encode_world(
        args.work_dir / "world.pt", partial(KLEIN.encode, vae), sprites, len(appearances), log=log
    )
    source = RowSource(KLEIN, make_pipeline(vae, make_transformer()), sprites, latent_world, appearances)
    distill_pipeline(source, args, decay_share=0.2, log=log)


if __name__ == "__main__":
    run(main)
