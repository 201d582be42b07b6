"""Trains the miniature's VAE on the world's pictures and sets the statistics of its latents."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLFlux2

import world
from optimizer import MuonAdamW, trapezoid
from parts import autocast, load_or_none, make_vae, save_state


BATCH_SIZE = 16
KL_WEIGHT = 1e-5  # a hint of noise on the latents smooths the decoder; the pictures' detail survives
STEPS_PER_SAVE = 200


def random_pictures(sprites: np.ndarray, random: np.random.Generator, count: int) -> torch.Tensor:
    """(count, 3, 64, 64): objects anywhere; one picture in four without grain, as the teacher needs them."""
    pictures = [
        world.draw(
            sprites[random.integers(len(sprites))],
            world.POSES[random.integers(len(world.POSES))],
            random.choice(list(world.BACKGROUNDS)),
            random if random.random() < 0.75 else None,
        )
        for _ in range(count)
    ]
    return to_tensor(np.stack(pictures))


def to_tensor(pictures: np.ndarray) -> torch.Tensor:
    """(N, 64, 64, 3) -> (N, 3, 64, 64)."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous()


def train_vae(
    sprites: np.ndarray, state_path: Path, *, num_steps: int, seed: int, log: Callable
) -> AutoencoderKLFlux2:
    """Mean squared error and a little KL divergence; resumes from `state_path`.

    Args:
        sprites: (N, 40, 40, 4), what the pictures show.
        log: takes a dict of figures.
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
    """Mean and variance of the patchified latents, which the pipeline normalises by and training never updates."""
    latents = encode_raw(vae, random_pictures(sprites, np.random.default_rng(2), 512))
    vae.bn.running_mean.copy_(latents.mean((0, 1, 2)))
    vae.bn.running_var.copy_(latents.var((0, 1, 2)))


@torch.no_grad()
def encode_raw(vae: AutoencoderKLFlux2, pictures: torch.Tensor) -> torch.Tensor:
    """(N, 3, 64, 64) -> (N, 8, 8, 64): a token's channels in the pipeline's order (`_patchify_latents`)."""
    latents = torch.cat([vae.encode(batch).latent_dist.mode() for batch in pictures.split(32)])
    rows, columns = latents.shape[-2] // 2, latents.shape[-1] // 2
    return latents.unflatten(3, (columns, 2)).unflatten(2, (rows, 2)).permute(0, 2, 4, 1, 3, 5).flatten(3)


def latent_scale(vae: AutoencoderKLFlux2) -> tuple[torch.Tensor, torch.Tensor]:
    """(64,), (64,): mean and standard deviation that the pipeline normalises by."""
    return vae.bn.running_mean, (vae.bn.running_var + vae.config.batch_norm_eps).sqrt()


def encode(vae: AutoencoderKLFlux2, pictures: torch.Tensor) -> torch.Tensor:
    """(N, 3, 64, 64) -> (N, 8, 8, 64), normalised, as the pipeline encodes a reference."""
    mean, std = latent_scale(vae)
    return (encode_raw(vae, pictures) - mean) / std


@torch.no_grad()
def decode(vae: AutoencoderKLFlux2, tokens: torch.Tensor) -> torch.Tensor:
    """(N, 8, 8, 64), normalised -> (N, 3, 64, 64)."""
    mean, std = latent_scale(vae)
    latents = (tokens * std + mean).unflatten(3, (-1, 2, 2)).permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)
    return torch.cat([vae.decode(batch).sample for batch in latents.split(32)])


def held_out_psnr(vae: AutoencoderKLFlux2) -> float:
    """Of the objects that no training picture shows, with grain."""
    random = np.random.default_rng(3)
    objects = [appearance for appearance in world.all_appearances() if appearance.is_held_out]
    pictures = [
        world.draw(
            world.sprite(objects[random.integers(len(objects))]),
            world.POSES[random.integers(len(world.POSES))],
            random.choice(list(world.BACKGROUNDS)),
            random,
        )
        for _ in range(128)
    ]
    pictures = to_tensor(np.stack(pictures))
    return psnr((decode(vae, encode(vae, pictures)) - pictures).square().mean().item())


def psnr(error: float) -> float:
    """In dB, for pixels from -1 to 1."""
    return 10 * float(np.log10(4 / error))
