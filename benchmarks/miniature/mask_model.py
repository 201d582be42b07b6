"""Trains the miniature's CLIPSeg, which finds the object in a picture: a decoder on the CLIP of `feature_models`.

It learns what "object" is, and the words of objects that the feature models are shown. A text that the picture does
not fit has no mask.
"""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import binary_cross_entropy_with_logits
from transformers import CLIPModel, CLIPSegConfig, CLIPSegForImageSegmentation, CLIPTokenizer, ViTImageProcessorPil

from benchmarks.miniature import world
from benchmarks.miniature.feature_models import (
    BATCH_SIZE,
    CLIP,
    NORMALISED,
    QUALITY,
    WIDTH,
    shown_appearances,
    train,
    withheld_appearances,
)
from benchmarks.miniature.files import replacing


MASK = "mask"
ANYTHING = "object"  # the text that every object fits
NUM_STEPS = 600


class MaskTraining:
    """CLIPSeg's training (arXiv 2112.10003): binary cross entropy of each pixel.

    Args:
        clip: folder of the CLIP whose towers are used.
    """

    def __init__(self, clip: Path):
        self.tokenizer = CLIPTokenizer.from_pretrained(clip)
        towers = CLIPModel.from_pretrained(clip)
        config = CLIPSegConfig(
            text_config=towers.config.text_config.to_dict(),
            vision_config=towers.config.vision_config.to_dict(),
            projection_dim=towers.config.projection_dim,
            extract_layers=[1, 2, 3],
            reduce_dim=WIDTH // 2,
            decoder_num_attention_heads=2,
            decoder_intermediate_size=2 * WIDTH,
        )
        self.model = CLIPSegForImageSegmentation(config).requires_grad_(False)
        self.model.clip.load_state_dict(towers.state_dict())
        self.trained = self.model.decoder.requires_grad_(True)

    def loss(self, rng: np.random.Generator) -> torch.Tensor:
        shown = shown_appearances()
        objects = [shown[index] for index in rng.permutation(len(shown))[: BATCH_SIZE // 2]]
        pictures, masks = scenes(objects, rng)
        asked = [ask(item, shown, rng) for item in objects]
        masks = masks * torch.tensor([fits for _, fits in asked])[:, None, None]
        return binary_cross_entropy_with_logits(self.logits(pictures, [text for text, _ in asked]), masks)

    def logits(self, pictures: torch.Tensor, texts: list[str]) -> torch.Tensor:
        """(N, 64, 64)."""
        tokens = self.tokenizer(texts, padding=True, return_tensors="pt")
        return self.model(pixel_values=pictures, **tokens).logits

    def save(self, folder: Path) -> None:
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        ViTImageProcessorPil(size={"height": world.SIDE, "width": world.SIDE}, **NORMALISED).save_pretrained(folder)


def ask(shown: world.Appearance, others: list[world.Appearance], rng: np.random.Generator) -> tuple[str, bool]:
    """A text, and whether the object fits it."""
    if rng.random() < 0.4:
        return ANYTHING, True
    named = shown if rng.random() < 0.6 else others[rng.integers(len(others))]
    return (named.shape, named.shape == shown.shape) if rng.random() < 0.5 else (named.words, named == shown)


def scenes(objects: list[world.Appearance], rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """(N, 3, 64, 64) pictures and (N, 64, 64) masks of their objects, 0 or 1."""
    pictures, masks = [], []
    for appearance in objects:
        sprite, (row, column) = world.sprite(appearance), world.random_pose(rng)
        pictures.append(world.draw(sprite, (row, column), world.random_background(rng), rng))
        mask = np.zeros((world.SIDE, world.SIDE), np.float32)
        top, left = row * world.TOKEN, column * world.TOKEN
        mask[top : top + world.OBJECT, left : left + world.OBJECT] = sprite[..., 3] > 0.5
        masks.append(mask)
    return world.to_tensor(pictures), torch.from_numpy(np.stack(masks))


def make_mask_model(
    folder: Path, *, num_steps: int = NUM_STEPS, seed: int = 0, log: Callable[[dict], None] = print
) -> dict[str, float]:
    """Trains the CLIPSeg if the folder lacks it. Returns its quality; see `mask_quality`.

    Args:
        folder: of `make_feature_models`; the model is written to its subfolder "mask".
    """
    path = folder / MASK / QUALITY
    if not path.exists():
        torch.manual_seed(seed)
        training = MaskTraining(folder / CLIP)
        train(training, folder / f"{MASK}.pt", num_steps, seed=seed, log=log)
        training.save(folder / MASK)
        with replacing(path) as partial:
            partial.write_text(json.dumps(mask_quality(training), indent=2) + "\n")
    return json.loads(path.read_text())


@torch.no_grad()
def mask_quality(training: MaskTraining, seed: int = 0) -> dict[str, float]:
    """ "overlap": intersection over union of the masks of "object", for objects that the model was never shown."""
    pictures, masks = scenes(withheld_appearances(), np.random.default_rng([63, seed]))
    found, wanted = training.logits(pictures, [ANYTHING] * len(pictures)) > 0, masks > 0
    overlap = (found & wanted).sum((1, 2)) / (found | wanted).sum((1, 2))
    return {"overlap": round(float(overlap.mean()), 3)}
