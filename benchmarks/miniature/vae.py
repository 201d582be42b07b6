"""Trains the miniature's VAE on the world's pictures and sets the statistics of its latents."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLFlux2, Flux2KleinPipeline

from benchmarks.miniature import world
from benchmarks.miniature.parts import make_vae
from benchmarks.miniature.training import MuonAdamW, autocast, load_or_none, save_state, trapezoid


BATCH_SIZE = 16
KL_WEIGHT = 1e-5  # so small that pictures keep their detail; a little noise on the latents smooths the decoder
STEPS_PER_SAVE = 200
GRAIN_SHARE = 0.75  # of the training pictures; the others have no grain, like those that the teacher is made from


def random_pictures(sprites: np.ndarray, rng: np.random.Generator, count: int) -> torch.Tensor:
    """(count, 3, 64, 64): random objects at random poses on random backgrounds, three in four with grain."""
    return world.to_tensor(
        [
            world.draw(
                sprites[rng.integers(len(sprites))],
                world.random_pose(rng),
                world.random_background(rng),
                rng if rng.random() < GRAIN_SHARE else None,
            )
            for _ in range(count)
        ]
    )


def train_vae(
    sprites: np.ndarray, state_path: Path, *, num_steps: int, seed: int, log: Callable[[dict], None]
) -> AutoencoderKLFlux2:
    """Minimises the squared error of decoded pictures and a little KL divergence. Resumes from `state_path`.

    Args:
        sprites: (N, 40, 40, 4), the objects in the pictures.
        log: called with a dict of metrics.

    Returns:
        The VAE in evaluation mode, frozen.
    """
    torch.manual_seed(seed)
    vae = make_vae()
    optimizer = MuonAdamW(vae, muon_lr=4e-3, adamw_lr=1e-3)
    step = 0
    if state := load_or_none(state_path):
        vae.load_state_dict(state["vae"])
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"]
    while step < num_steps:
        pictures = random_pictures(sprites, np.random.default_rng([1, seed, step]), BATCH_SIZE)
        with autocast():
            posterior = vae.encode(pictures).latent_dist
            decoded = vae.decode(posterior.sample()).sample
        error = (decoded.float() - pictures).square().mean()
        (error + KL_WEIGHT * posterior.kl().mean() / pictures[0].numel()).backward()
        optimizer.step(trapezoid(step, num_steps, warmup=20, decay_share=0.5))
        step += 1
        if step % STEPS_PER_SAVE == 0 or step == num_steps:
            log({"vae_step": step, "vae_psnr": psnr(error.item())})
            save_state({"vae": vae.state_dict(), "optimizer": optimizer.state_dict(), "step": step}, state_path)
    vae.eval().requires_grad_(False)
    set_latent_statistics(vae, sprites)
    log({"vae_psnr_held_out": held_out_psnr(vae)})
    return vae


@torch.no_grad()
def set_latent_statistics(vae: AutoencoderKLFlux2, sprites: np.ndarray) -> None:
    """Sets mean and variance of the patchified latents, by which the pipeline normalises. Training does not."""
    latents = encode_raw(vae, random_pictures(sprites, np.random.default_rng(2), 512))
    vae.bn.running_mean.copy_(latents.mean((0, 1, 2)))
    vae.bn.running_var.copy_(latents.var((0, 1, 2)))


@torch.no_grad()
def encode_raw(vae: AutoencoderKLFlux2, pictures: torch.Tensor) -> torch.Tensor:
    """(N, 3, 64, 64) -> (N, 8, 8, 64), patchified as in the pipeline, not normalised."""
    latents = torch.cat([vae.encode(batch).latent_dist.mode() for batch in pictures.split(32)])
    return Flux2KleinPipeline._patchify_latents(latents).permute(0, 2, 3, 1).contiguous()


def latent_scale(vae: AutoencoderKLFlux2) -> tuple[torch.Tensor, torch.Tensor]:
    """(64,), (64,): mean and standard deviation by which the pipeline normalises."""
    return vae.bn.running_mean, (vae.bn.running_var + vae.config.batch_norm_eps).sqrt()


def encode(vae: AutoencoderKLFlux2, pictures: torch.Tensor) -> torch.Tensor:
    """(N, 3, 64, 64) -> (N, 8, 8, 64), normalised like the latents of a reference in the pipeline."""
    mean, std = latent_scale(vae)
    return (encode_raw(vae, pictures) - mean) / std


@torch.no_grad()
def decode(vae: AutoencoderKLFlux2, tokens: torch.Tensor) -> torch.Tensor:
    """(N, 8, 8, 64), normalised -> (N, 3, 64, 64)."""
    mean, std = latent_scale(vae)
    latents = Flux2KleinPipeline._unpatchify_latents((tokens * std + mean).permute(0, 3, 1, 2))
    return torch.cat([vae.decode(batch).sample for batch in latents.split(32)])


def held_out_psnr(vae: AutoencoderKLFlux2) -> float:
    """PSNR in dB on pictures, with grain, of objects that training does not show."""
    rng = np.random.default_rng(3)
    objects = world.held_out_appearances()
    pictures = world.to_tensor(
        [
            world.draw(
                world.sprite(objects[rng.integers(len(objects))]),
                world.random_pose(rng),
                world.random_background(rng),
                rng,
            )
            for _ in range(128)
        ]
    )
    return psnr((decode(vae, encode(vae, pictures)) - pictures).square().mean().item())


def psnr(error: float) -> float:
    """Peak signal-to-noise ratio in dB of a mean squared error, for pixels from -1 to 1."""
    return 10 * float(np.log10(4 / error))
