"""Trains the vision tower of the miniature's Qwen3-VL, through the frozen text encoder.

The diffusion transformer will see the text encoder's states of a picture's visual tokens. From these states, a linear
head predicts what each token shows of the object on a canonical background, and where in the object it lies. So the
transformer only has to put the tokens in another place. The head is thrown away after the training.
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
    miniature_vlm_config,
)


BATCH_SIZE = 24
MUON_LR, ADAMW_LR = 1e-2, 2e-3
OBJECT_TOKENS = world.OBJECT // world.TOKEN  # on a side of the object's square
ROW, COLUMN = slice(OBJECT_TOKENS), slice(OBJECT_TOKENS, 2 * OBJECT_TOKENS)  # in `place_targets`
GRID_TOKENS = world.SIDE // world.TOKEN  # on a side of the picture
PLACE_WEIGHT = 10.0  # of the error of row, column and object flag; that of the latents has weight 1
OUTSIDE_WEIGHT = 0.1  # of the latents of tokens outside the object's square; those inside have weight 1
CANONICAL_BACKGROUND = "stone"
STEPS_PER_SAVE = 200


class TowerTraining(torch.nn.Module):
    """The tower, the frozen text encoder behind it, and the head that is trained with the tower.

    Args:
        text_encoder: of the pipeline. Its weights are shared, not copied.
        prefix: ids of the L tokens before the visual ones: of the chat template, and the one that starts an image.
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
        config = miniature_vlm_config(text_encoder.config)
        self.tower = make_tower(config, seed=seed)
        self.head = torch.nn.Linear(TEXT_WIDTH, TOKEN_CHANNELS + 2 * OBJECT_TOKENS + 1)
        with torch.device("meta"):
            vlm = Qwen3VLModel(config)
        vlm.language_model.load_state_dict(text_encoder.state_dict(), assign=True)
        vlm.language_model.rotary_emb = type(vlm.language_model.rotary_emb)(config.text_config)
        # In a list it is no child module, so it is neither trained nor saved.
        self.language_model = [vlm.language_model.eval().requires_grad_(False)]
        self.prefix, self.encode = torch.tensor(prefix), encode

    def visual_states(self, pictures: torch.Tensor) -> torch.Tensor:
        """What the transformer sees of the visual tokens: the text encoder's states before its last layer.

        They do not depend on the prompt, which follows the image.

        Args:
            pictures: (N, 3, 64, 64), -1 to 1.

        Returns:
            (N, 64, D).
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
        """Errors on `count` random pictures of these objects, (N, 40, 40, 4).

        Returns:
            "content": mean squared error of the latents that the object has on the canonical background.
            "place": mean squared error of row, column and object flag.
            "right": share of the object's tokens whose row and column are both recognised.
        """
        objects = rng.integers(len(sprites), size=count)
        poses = [world.random_pose(rng) for _ in objects]
        pictures, clean = [], []
        for index, pose in zip(objects, poses, strict=True):
            pictures.append(world.draw(sprites[index], pose, world.random_background(rng), rng))
            clean.append(world.draw(sprites[index], pose, CANONICAL_BACKGROUND))
        states = self.visual_states(world.to_tensor(pictures))
        # Scaled like in the RMSNorm with which the transformer begins.
        predicted = self.head(states * torch.rsqrt(states.square().mean(-1, keepdim=True) + 1e-6))
        content, place = predicted.tensor_split([TOKEN_CHANNELS], -1)
        true_content = self.encode(world.to_tensor(clean)).flatten(1, 2)
        true_place, is_inside = place_targets(torch.tensor(poses))
        weight = torch.where(is_inside, 1.0, OUTSIDE_WEIGHT)[..., None]
        is_row_right, is_column_right = (
            place[..., part].argmax(-1) == true_place[..., part].argmax(-1) for part in (ROW, COLUMN)
        )
        return {
            "content": ((content - true_content).square() * weight).mean() / weight.mean(),
            "place": (place - true_place).square().mean(),
            "right": (is_row_right & is_column_right)[is_inside].float().mean(),
        }


def patches(pictures: torch.Tensor) -> torch.Tensor:
    """Flattens square pictures to patches in the order of Qwen3-VL's processor.

    The patches of a merged token follow each other. A still picture has two equal frames.

    Args:
        pictures: (N, 3, S, S), -1 to 1.

    Returns:
        (N * (S / PATCH)^2, 3 * 2 * PATCH^2).
    """
    merged = pictures.shape[-1] // (PATCH * MERGE)
    parts = pictures.view(-1, 3, merged, MERGE, PATCH, merged, MERGE, PATCH).permute(0, 2, 5, 3, 6, 1, 4, 7)
    return parts.unsqueeze(6).expand(*parts.shape[:6], 2, PATCH, PATCH).reshape(-1, 3 * 2 * PATCH * PATCH)


def place_targets(poses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Where in the object's square each of the picture's 64 tokens lies.

    Args:
        poses: (N, 2), row and column of the square's upper left corner, in tokens.

    Returns:
        (N, 64, 5 + 5 + 1), one-hot row, one-hot column and 1, or only zeros outside the square; and (N, 64), whether
        the token is inside.
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
        held_out: (M, 40, 40, 4), objects that training does not show, for measuring.
        log: called with a dict of metrics.

    Returns:
        The tower in evaluation mode, frozen.
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
                    measured = training.losses(shown, np.random.default_rng([8, seed]), 2 * BATCH_SIZE)
                    figures = {key: round(value.item(), 4) for key, value in measured.items()}
                    log({"tower_step": step, "objects": name, **figures})
            state = {"training": training.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
            save_state(state, state_path)
    return training.tower.eval().requires_grad_(False)
