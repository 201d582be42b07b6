"""Trains feature models of the miniature's world, for comparing what `evaluate_lora.py` measures with an exact reader.

    python -m benchmarks.miniature.feature_models --output_dir miniature-feature-models

A CLIP learns from captions, a DINOv2 without them: two views of a picture are to have the same features. Both are of
the classes that the Hub's models have, and are written as folders that `--clip_model` and `--dino_model` read. Neither
is shown the experiment's concepts, nor one in eight of the other objects, by which it is measured. Run the same
command again to continue a stopped training.
"""

import argparse
import json
import zlib
from collections.abc import Callable
from functools import cache
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from tokenizers import pre_tokenizers
from torch.nn.functional import affine_grid, cross_entropy, grid_sample, normalize
from transformers import (
    BitImageProcessorPil,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTokenizer,
    Dinov2Config,
    Dinov2Model,
    PreTrainedModel,
)

from benchmarks.miniature import world
from benchmarks.miniature.command_line import HelpFormatter, positive_int, run
from benchmarks.miniature.concepts import CONCEPTS
from benchmarks.miniature.files import check_settings, make_folder, replacing
from benchmarks.miniature.making import Log, load_or_draw_sprites
from benchmarks.miniature.tasks import random_picture
from benchmarks.miniature.training import MuonAdamW, load_or_none, save_state, trapezoid
from benchmarks.miniature.vae import random_pictures


CLIP, DINO = "clip", "dino"
NUM_STEPS = {CLIP: 400, DINO: 500}
BATCH_SIZE = 128  # pictures, or pairs of views
WIDTH = 64  # of features, and of the layers of both image towers
PATCH = world.TOKEN  # pixels
TEMPERATURE = 0.05
STEPS_PER_SAVE = 100
WITHHELD_EVERY = 8  # one in this many objects
NUM_UNNAMED = 1000  # objects without a name, which DINOv2 is shown as well
NAMED_BACKGROUNDS = 0.8  # share of CLIP's pictures whose background is one of the world's
WHOLE_CAPTIONS = 0.6  # share of captions that leave nothing out
QUALITY = "quality.json"
MAX_TEXT_TOKENS = 77  # CLIP's
PARTS = ("shape", "texture", "colours", "background")


def is_withheld(appearance: world.Appearance) -> bool:
    """Whether the feature models are never shown it: a concept, or one in eight of the others."""
    if any(appearance == concept.appearance for concept in CONCEPTS):
        return True
    return zlib.crc32(f"feature models: {appearance.words}".encode()) % WITHHELD_EVERY == 0


@cache
def shown_appearances() -> list[world.Appearance]:
    return [appearance for appearance in world.all_appearances() if not is_withheld(appearance)]


@cache
def withheld_appearances() -> list[world.Appearance]:
    return [appearance for appearance in world.all_appearances() if is_withheld(appearance)]


def make_tokenizer() -> CLIPTokenizer:
    """CLIP's own kind: a word of the world is few tokens, any other text falls into bytes."""
    texts = [world.caption(appearance.words, name) for appearance in shown_appearances() for name in world.BACKGROUNDS]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(f"{symbol}</w>" for symbol in alphabet)]
    merges = {}
    for word in sorted({word for text in texts for word in text.split()}):
        symbols = [*word[:-1], f"{word[-1]}</w>"]
        for end in range(1, len(symbols)):
            merges["".join(symbols[:end]), symbols[end]] = None
    tokens += dict.fromkeys("".join(pair) for pair in merges)
    vocab = {token: index for index, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocab, merges=[*merges], model_max_length=MAX_TEXT_TOKENS)


def make_clip(tokenizer: CLIPTokenizer) -> CLIPModel:
    """Image tower of 4 layers, text tower of 2; random weights."""
    layers = {"hidden_size": WIDTH, "intermediate_size": 3 * WIDTH, "num_attention_heads": WIDTH // 32}
    text = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": MAX_TEXT_TOKENS,
        "num_hidden_layers": 2,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {"image_size": world.SIDE, "patch_size": PATCH, "num_hidden_layers": 4}
    model = CLIPModel(CLIPConfig(text_config=layers | text, vision_config=layers | vision, projection_dim=WIDTH))
    model.logit_scale.data.fill_(-np.log(TEMPERATURE)).requires_grad_(False)
    return model


def make_dino() -> Dinov2Model:
    """4 layers; random weights."""
    return Dinov2Model(
        Dinov2Config(
            hidden_size=WIDTH,
            mlp_ratio=3,
            num_hidden_layers=4,
            num_attention_heads=WIDTH // 32,
            image_size=world.SIDE,
            patch_size=PATCH,
            use_mask_token=False,
        )
    )


class ClipTraining:
    """Contrastive training on pictures and their captions (arXiv 2103.00020)."""

    def __init__(self, sprites: np.ndarray):
        self.tokenizer = make_tokenizer()
        self.model = make_clip(self.tokenizer)
        self.trained = torch.nn.ModuleDict({"model": self.model})

    def loss(self, rng: np.random.Generator) -> torch.Tensor:
        shown = shown_appearances()
        objects = [shown[index] for index in rng.permutation(len(shown))[:BATCH_SIZE]]
        backgrounds = [world.random_background(rng) if rng.random() < NAMED_BACKGROUNDS else None for _ in objects]
        pictures = world.to_tensor([scene(*pair, rng) for pair in zip(objects, backgrounds, strict=True)])
        # Of a world of more than one size, as that of photographs is.
        pictures = torch.where(
            torch.from_numpy(rng.random((len(objects), 1, 1, 1)) < 0.5), view(pictures, rng), pictures
        )
        captions = [loose_caption(*pair, rng) for pair in zip(objects, backgrounds, strict=True)]
        tokens = self.tokenizer(captions, padding=True, return_tensors="pt")
        logits = self.model(pixel_values=pictures, **tokens).logits_per_text
        return (matching_loss(logits) + matching_loss(logits.T)) / 2

    def save(self, folder: Path) -> None:
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        sides = {"height": world.SIDE, "width": world.SIDE}
        processor = CLIPImageProcessorPil(size={"shortest_edge": world.SIDE}, crop_size=sides, **NORMALISED)
        processor.save_pretrained(folder)


class DinoTraining:
    """Contrastive training on two views of each picture, without captions (arXiv 2002.05709).

    Args:
        sprites: (N, 40, 40, 4), of the objects in the pictures.
    """

    def __init__(self, sprites: np.ndarray):
        self.sprites, self.model = sprites, make_dino()
        head = torch.nn.Sequential(torch.nn.Linear(WIDTH, WIDTH), torch.nn.GELU(), torch.nn.Linear(WIDTH, WIDTH))
        self.trained = torch.nn.ModuleDict({"model": self.model, "head": head})  # the head is not saved

    def loss(self, rng: np.random.Generator) -> torch.Tensor:
        pictures = random_pictures(self.sprites, rng, BATCH_SIZE)
        views = torch.cat([view(pictures, rng), view(pictures, rng)])
        features = normalize(self.trained["head"](self.model(pixel_values=views).pooler_output), dim=-1)
        first, second = features.chunk(2)
        logits = first @ second.T / TEMPERATURE
        return (matching_loss(logits) + matching_loss(logits.T)) / 2

    def save(self, folder: Path) -> None:
        self.model.save_pretrained(folder)
        sides = {"height": world.SIDE, "width": world.SIDE}
        BitImageProcessorPil(size={"shortest_edge": world.SIDE}, crop_size=sides, **NORMALISED).save_pretrained(folder)


TRAININGS = {CLIP: ClipTraining, DINO: DinoTraining}
NORMALISED = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}  # pixels from -1 to 1, as the world draws them


def matching_loss(logits: torch.Tensor) -> torch.Tensor:
    """Cross entropy of (N, N) logits whose diagonal is right."""
    return cross_entropy(logits, torch.arange(len(logits)))


def scene(appearance: world.Appearance, background: str | None, rng: np.random.Generator) -> np.ndarray:
    """(64, 64, 3): the object at a random place, three times in four with grain.

    Args:
        background: its name; None for one of any colour, which has no name.
    """
    ground = background or tuple(int(part) for part in rng.integers(40, 240, 3))
    pixels = world.draw(world.sprite(appearance), world.random_pose(rng), ground)
    return pixels + world.grain(rng) if rng.random() < 0.75 else pixels


def loose_caption(appearance: world.Appearance, background: str | None, rng: np.random.Generator) -> str:
    """The caption, often without texture, colours or background, so that the model also knows "a heart on sand"."""
    has_texture, has_colours, has_background = rng.random(3) < (1 if rng.random() < WHOLE_CAPTIONS else 0.6)
    words = [
        *([appearance.texture] if has_texture else []),
        *([" and ".join(appearance.colours)] if has_colours else []),
        appearance.shape,
    ]
    return f"a {' '.join(words)}" + (f" on {background}" if background and has_background else "")


def view(pictures: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """(N, 3, 64, 64): each picture cropped, half of them mirrored, in slightly other colours, with other noise."""
    count = len(pictures)
    scale = rng.uniform(0.65, 1, count)
    reach = 1 - scale  # the crop stays inside
    mirror = np.where(rng.random(count) < 0.5, -1, 1)
    moves = np.zeros((count, 2, 3), np.float32)
    moves[:, 0, 0], moves[:, 1, 1] = scale * mirror, scale
    moves[:, 0, 2], moves[:, 1, 2] = (reach * rng.uniform(-1, 1, count) for _ in range(2))
    grid = affine_grid(torch.from_numpy(moves), list(pictures.shape), align_corners=False)
    cropped = grid_sample(pictures, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
    gain, offset = (
        torch.from_numpy(rng.normal(middle, 0.1, (count, 3, 1, 1)).astype(np.float32)) for middle in (1, 0)
    )
    noise = rng.normal(0, 1, pictures.shape).astype(np.float32) * rng.uniform(0, 0.1, (count, 1, 1, 1))
    return cropped * gain + offset + torch.from_numpy(noise.astype(np.float32))


def train(
    training: ClipTraining | DinoTraining, state_path: Path, num_steps: int, *, seed: int, log: Callable[[dict], None]
) -> None:
    """Trains to the last step. Resumes from `state_path`."""
    optimizer, step = MuonAdamW(training.trained, muon_lr=1e-2, adamw_lr=2e-3), 0
    if state := load_or_none(state_path):
        training.trained.load_state_dict(state["weights"])
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"]
    while step < num_steps:
        loss = training.loss(np.random.default_rng([60, seed, step]))
        loss.backward()
        optimizer.step(trapezoid(step, num_steps, warmup=20, decay_share=0.5))
        step += 1
        if step % STEPS_PER_SAVE == 0 or step == num_steps:
            log({"model": state_path.stem, "step": step, "loss": round(loss.item(), 4)})
            weights = training.trained.state_dict()
            save_state({"weights": weights, "optimizer": optimizer.state_dict(), "step": step}, state_path)
    training.trained.eval()


def make_feature_models(folder: Path, *, num_steps: dict[str, int] = NUM_STEPS, seed: int = 0) -> dict[str, dict]:
    """Trains what the folder lacks. Returns the quality of each model; see `clip_quality` and `dino_quality`.

    Args:
        folder: the models are written to its subfolders "clip" and "dino".
        num_steps: of each model's training.

    Raises:
        InputError: the folder's models were trained with other settings.
    """
    make_folder(folder, flag="--output_dir")
    check_settings(folder, {"num_steps": num_steps, "seed": seed, "width": WIDTH}, flag="--output_dir")
    log, figures = Log(folder / "log.jsonl"), {}
    for name, make_training in TRAININGS.items():
        path = folder / name / QUALITY
        if not path.exists():
            sprites = load_or_draw_sprites(folder / "sprites.npy", shown_appearances(), NUM_UNNAMED, seed=seed)
            torch.manual_seed(seed)
            training = make_training(sprites)
            train(training, folder / f"{name}.pt", num_steps[name], seed=seed, log=log)
            training.save(folder / name)
            quality = clip_quality(training) if name == CLIP else dino_quality(training.model)
            log({"model": name, **quality})
            with replacing(path) as partial:
                partial.write_text(json.dumps(quality, indent=2) + "\n")
        figures[name] = json.loads(path.read_text())
    return figures


@torch.no_grad()
def clip_quality(training: ClipTraining, seed: int = 0) -> dict[str, float]:
    """What the CLIP makes of objects that it was never shown, on every background.

    Returns:
        "retrieval", the share of pictures whose own caption is nearest among those of all pictures; and for shape,
        texture, colours and background: the share whose nearest caption has it right.
    """
    scenes = [(item, name) for item in withheld_appearances() for name in world.BACKGROUNDS]
    rng = np.random.default_rng([61, seed])
    pictures = world.to_tensor([random_picture(*one, rng) for one in scenes])
    captions = [world.caption(item.words, name) for item, name in scenes]
    tokens = training.tokenizer(captions, padding=True, return_tensors="pt")
    nearest = training.model(pixel_values=pictures, **tokens).logits_per_image.argmax(1).tolist()
    own = [(item.shape, item.texture, item.colours, name) for item, name in scenes]
    is_right = np.array([[a == b for a, b in zip(own[i], own[j], strict=True)] for i, j in enumerate(nearest)])
    shares = {"retrieval": is_right.all(1).mean(), **dict(zip(PARTS, is_right.mean(0), strict=True))}
    return {name: round(float(share), 3) for name, share in shares.items()}


@torch.no_grad()
def dino_quality(model: PreTrainedModel, seed: int = 0) -> dict[str, float]:
    """Nearest neighbours among pictures of objects that the DINOv2 was never shown.

    Returns:
        "same_background": the share of pictures that are nearest to another picture of their object, where all are on
        one background; "other_background": the same where every picture is on another one; "chance" for both.
    """
    objects, rng = withheld_appearances(), np.random.default_rng([62, seed])
    names = [*world.BACKGROUNDS]
    features = {}
    for name in names:
        pictures = world.to_tensor([random_picture(item, name, rng) for item in objects for _ in range(2)])
        features[name] = normalize(model(pixel_values=pictures).pooler_output, dim=-1)
    labels = torch.arange(len(objects)).repeat_interleave(2)

    same, other = [], []
    for name in names:
        similarity = features[name] @ features[name].T
        similarity.fill_diagonal_(-1)
        same.append(labels[similarity.argmax(1)] == labels)
    for one, another in combinations(names, 2):
        other.append(labels[(features[one] @ features[another].T).argmax(1)] == labels)
    return {
        "same_background": round(float(torch.cat(same).float().mean()), 3),
        "other_background": round(float(torch.cat(other).float().mean()), 3),
        "chance": round(1 / len(objects), 3),
    }


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("miniature-feature-models"), help="Their folder.")
    for name, count in NUM_STEPS.items():
        parser.add_argument(f"--{name}_steps", type=positive_int, default=count, help="Steps of its training.")
    parser.add_argument("--seed", type=int, default=0, help="Seed for the weights and the training.")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    num_steps = {CLIP: args.clip_steps, DINO: args.dino_steps}
    figures = make_feature_models(args.output_dir, num_steps=num_steps, seed=args.seed)
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    run(main)
