"""Trains the vision tower of the miniature's Qwen3-VL, through the frozen text encoder.

From the states of a picture's visual tokens, as the diffusion transformer will see them, linear heads are to tell what
the token shows and where it lies in the object, whatever the object's place and background. The transformer only has
to put it elsewhere. The heads are thrown away.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from transformers import Qwen3Model
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLModel, Qwen3VLVisionModel

from benchmarks.miniature import world
from benchmarks.miniature.parts import TOKEN_CHANNELS
from benchmarks.miniature.training import MuonAdamW, load_or_none, save_state, trapezoid
from benchmarks.miniature.zimage_parts import (
    MERGE,
    NUM_VISUAL_TOKENS,
    PATCH,
    TEXT_WIDTH,
    make_tower,
    vlm_config,
)


BATCH_SIZE = 24
MUON_LR, ADAMW_LR = 1e-2, 2e-3
OBJECT_TOKENS = world.OBJECT // world.TOKEN  # on a side of the object's square
GRID_TOKENS = world.SIDE // world.TOKEN  # on a side of the picture
PLACE_WEIGHT = 10.0  # of the error of row, column and object flag, relative to that of the latents
OUTSIDE_WEIGHT = 0.1  # of the latents outside the object's square
CANONICAL_BACKGROUND = "stone"
STEPS_PER_SAVE = 200


class TowerTraining(torch.nn.Module):
    """The tower, the frozen text encoder behind it, and the heads.

    Args:
        text_encoder: of the pipeline.
        prefix: token ids before the visual tokens: of the chat template and the start of an image.
        encode: pictures (N, 3, 64, 64) -> tokens (N, 8, 8, 64).
        seed: of the initial weights.
    """

    def __init__(
        self,
        text_encoder: Qwen3Model,
        prefix: list[int],
        encode: Callable[[torch.Tensor], torch.Tensor],
        *,
        seed: int,
    ):
        super().__init__()
        config = vlm_config(text_encoder.config)
        self.tower = make_tower(config, seed=seed)
        self.head = torch.nn.Linear(TEXT_WIDTH, TOKEN_CHANNELS + 2 * OBJECT_TOKENS + 1)
        with torch.device("meta"):
            vlm = Qwen3VLModel(config)
        vlm.language_model.load_state_dict(text_encoder.state_dict(), assign=True)
        vlm.language_model.rotary_emb = type(vlm.language_model.rotary_emb)(config.text_config)
        # Not a child module: it is neither trained nor saved.
        self.language_model = [vlm.language_model.eval().requires_grad_(False)]
        self.prefix, self.encode = torch.tensor(prefix), encode

    def visual_states(self, pictures: torch.Tensor) -> torch.Tensor:
        """(N, 64, D): the text encoder's last but one layer at the visual tokens of pictures (N, 3, 64, 64).

        The prompt follows the image, so that these states do not depend on it.
        """
        count, (language_model,) = len(pictures), self.language_model
        side = world.SIDE // PATCH
        visual = self.tower(patches(pictures), grid_thw=torch.tensor([[1, side, side]]).expand(count, -1))
        visual = visual.pooler_output.view(count, NUM_VISUAL_TOKENS, -1)
        prefix = language_model.embed_tokens(self.prefix).expand(count, -1, -1)
        # M-RoPE: (time, row, column). An image's tokens share the time at which it starts.
        start, index = len(self.prefix), torch.arange(NUM_VISUAL_TOKENS)
        image = start + torch.stack([torch.zeros_like(index), index // (side // MERGE), index % (side // MERGE)])
        positions = torch.cat([torch.arange(start).expand(3, -1), image], 1)[:, None].expand(-1, count, -1)
        hidden = language_model(
            inputs_embeds=torch.cat([prefix, visual], 1),
            attention_mask=torch.ones(count, positions.shape[2], dtype=torch.long),
            position_ids=positions,
            output_hidden_states=True,
            use_cache=False,
        ).hidden_states
        return hidden[-2][:, start:]

    def losses(self, sprites: np.ndarray, rng: np.random.Generator, count: int) -> dict[str, torch.Tensor]:
        """ "content": mean squared error of the object's latents on the canonical background. "place": that of row,
        column and object flag. "right": share of the object's tokens whose row and column are told right."""
        objects = rng.integers(len(sprites), size=count)
        poses = [world.random_pose(rng) for _ in objects]
        pictures = [
            world.draw(sprites[index], pose, world.random_background(rng), rng)
            for index, pose in zip(objects, poses, strict=True)
        ]
        clean = [
            world.draw(sprites[index], pose, CANONICAL_BACKGROUND) for index, pose in zip(objects, poses, strict=True)
        ]
        states = self.visual_states(world.to_tensor(pictures))
        # Like the RMSNorm with which the transformer begins.
        told = self.head(states * torch.rsqrt(states.square().mean(-1, keepdim=True) + 1e-6))
        place, is_inside = place_targets(torch.tensor(poses))
        content = self.encode(world.to_tensor(clean)).flatten(1, 2)
        weight = torch.where(is_inside, 1.0, OUTSIDE_WEIGHT)[..., None]
        content_error = ((told[..., :TOKEN_CHANNELS] - content).square() * weight).mean() / weight.mean()
        told_place = told[..., TOKEN_CHANNELS:]
        is_right = [
            told_place[..., part].argmax(-1) == place[..., part].argmax(-1)
            for part in (slice(OBJECT_TOKENS), slice(OBJECT_TOKENS, 2 * OBJECT_TOKENS))
        ]
        return {
            "content": content_error,
            "place": (told_place - place).square().mean(),
            "right": (is_right[0] & is_right[1])[is_inside].float().mean(),
        }


def patches(pictures: torch.Tensor) -> torch.Tensor:
    """(N, 3, H, W), -1 to 1 -> (N * patches, 3 * 2 * PATCH * PATCH): as Qwen3-VL's processor orders them.

    The patches of a merged token follow each other, and each is repeated for the two frames of a still picture.
    """
    merged = pictures.shape[-1] // (PATCH * MERGE)
    parts = pictures.view(-1, 3, merged, MERGE, PATCH, merged, MERGE, PATCH).permute(0, 2, 5, 3, 6, 1, 4, 7)
    return parts.unsqueeze(6).expand(*parts.shape[:6], 2, PATCH, PATCH).reshape(-1, 3 * 2 * PATCH * PATCH)


def place_targets(poses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Where each of the picture's 64 tokens lies in the object's square.

    Args:
        poses: (N, 2), row and column of the square's corner, in tokens.

    Returns:
        (N, 64, 2 * 5 + 1): one-hot row, one-hot column and 1; all 0 outside the square. And (N, 64), bool: inside.
    """
    rows, columns = torch.meshgrid(torch.arange(GRID_TOKENS), torch.arange(GRID_TOKENS), indexing="ij")
    row, column = rows.flatten() - poses[:, :1], columns.flatten() - poses[:, 1:]
    is_inside = (row >= 0) & (row < OBJECT_TOKENS) & (column >= 0) & (column < OBJECT_TOKENS)
    one_hot = [torch.nn.functional.one_hot(part.clamp(0, OBJECT_TOKENS - 1), OBJECT_TOKENS) for part in (row, column)]
    return torch.cat([*one_hot, torch.ones_like(row)[..., None]], -1) * is_inside[..., None].float(), is_inside


def train_tower(
    training: TowerTraining,
    sprites: np.ndarray,
    held_out: np.ndarray,
    state_path: Path,
    *,
    num_steps: int,
    seed: int,
    log: Callable[[dict], None],
) -> Qwen3VLVisionModel:
    """Trains the tower. Resumes from `state_path`.

    Args:
        sprites: (N, 40, 40, 4), the objects in the pictures.
        held_out: the same, of objects that training does not show; only measured.
        log: called with a dict of metrics.
    """
    optimizer = MuonAdamW(training, muon_lr=MUON_LR, adamw_lr=ADAMW_LR)
    step = 0
    if state := load_or_none(state_path):
        training.load_state_dict(state["training"])
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"]
    while step < num_steps:
        losses = training.losses(sprites, np.random.default_rng([7, seed, step]), BATCH_SIZE)
        (losses["content"] + PLACE_WEIGHT * losses["place"]).backward()
        optimizer.step(trapezoid(step, num_steps, warmup=20, decay_share=0.4))
        step += 1
        if step % STEPS_PER_SAVE == 0 or step == num_steps:
            with torch.no_grad():
                for name, shown in (("seen", sprites), ("unseen", held_out)):
                    losses = training.losses(shown, np.random.default_rng([8, seed]), 2 * BATCH_SIZE)
                    figures = {key: round(value.item(), 4) for key, value in losses.items()}
                    log({"tower_step": step, "objects": name, **figures})
            state = {"training": training.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
            save_state(state, state_path)
    return training.tower.eval().requires_grad_(False)
