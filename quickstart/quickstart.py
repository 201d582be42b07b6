"""The quick start: makes a tiny FLUX.2-klein and four pictures, trains a LoRA with the real script, draws the result.

No download and no GPU: the model has FLUX.2-klein's classes and random weights. Run `bash quickstart.sh`.
"""

import os


# Before any library reads them: nothing here is on the hub, and tiny models gain nothing from a second thread.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"

import argparse
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import diffusers
import torch
import transformers
from diffusers import Flux2KleinPipeline, Flux2Transformer2DModel
from PIL import Image, ImageDraw
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from contact_sheet import Row, draw_sheet, mean_distance
from tiny_klein import make_tiny_klein


REPOSITORY = Path(__file__).resolve().parents[1]
SIDE = 96  # pixels
MAX_SEQUENCE_LENGTH = 192  # the tiny tokenizer gives one token a byte; short prompts keep the run short
TEACHER_PROMPT_SUFFIX = " Reproduce the reference image."
NUM_STEPS = 4
MARKER = ".made-by-quickstart"

# Caption -> colours of the background's upper and lower part.
SCENES = {
    "a striped ball on grass": ("#9fd3f5", "#4c9a3f"),
    "a striped ball on sand": ("#f6c28b", "#d9b36c"),
    "a striped ball at night": ("#10142e", "#2b3160"),
    "a striped ball on snow": ("#7f8fa6", "#f4f7fa"),
}


def main() -> None:
    args = parse_args()
    output_dir = args.output_dir.resolve()
    clear(output_dir)
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    model_dir, pictures_dir, lora_dir = output_dir / "tiny-klein", output_dir / "pictures", output_dir / "lora"

    announce("1. A tiny FLUX.2-klein with random weights, and four pictures with captions")
    make_tiny_klein(model_dir)
    strengthen(model_dir)
    pictures = draw_pictures(pictures_dir)
    print(f"{model_dir}\n{pictures_dir}: {', '.join(sorted(path.name for path in pictures_dir.iterdir()))}")

    announce("2. Training")
    train(model_dir, pictures_dir, lora_dir, args.max_train_steps)

    announce("3. The LoRA in stock diffusers")
    pipeline = Flux2KleinPipeline.from_pretrained(model_dir)
    pipeline.set_progress_bar_config(disable=True)
    base = [sample(pipeline, caption, seed=row) for row, caption in enumerate(pictures)]
    teacher = [
        sample(pipeline, caption + TEACHER_PROMPT_SUFFIX, seed=row, image=picture)
        for row, (caption, picture) in enumerate(pictures.items())
    ]
    pipeline.load_lora_weights(lora_dir)
    student = [sample(pipeline, caption, seed=row) for row, caption in enumerate(pictures)]

    rows = [
        Row(caption, b.image, t.image, s.image, picture, distance=remaining_distance(b, s, t))
        for (caption, picture), b, t, s in zip(pictures.items(), base, teacher, student, strict=True)
    ]
    sheet_path = output_dir / "before_after.png"
    draw_sheet(rows, read_losses(lora_dir)).save(sheet_path)
    report(rows, lora_dir, model_dir, sheet_path)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, default=REPOSITORY / "quickstart-output", help="Is cleared first.")
    parser.add_argument("--max_train_steps", type=int, default=200)
    return parser.parse_args()


def announce(text: str) -> None:
    print(f"\n== {text}", flush=True)


def clear(folder: Path) -> None:
    """Empties the folder of an earlier quick start, and nobody else's."""
    if folder.exists() and any(folder.iterdir()) and not (folder / MARKER).exists():
        sys.exit(f"--output_dir {folder}: holds something else; choose a new or empty folder")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / MARKER).touch()


def strengthen(model_dir: Path) -> None:
    """Scales the transformer's matrices up, so that caption and picture change what it draws enough to be seen."""
    transformer = Flux2Transformer2DModel.from_pretrained(model_dir, subfolder="transformer")
    with torch.no_grad():
        for module in transformer.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight *= 1.4
    transformer.save_pretrained(model_dir / "transformer")


# Pictures


def draw_pictures(folder: Path) -> dict[str, Image.Image]:
    """Writes a picture and a .txt with its caption for each scene; returns caption -> picture."""
    folder.mkdir()
    pictures = {caption: draw_ball(*colours) for caption, colours in SCENES.items()}
    for caption, picture in pictures.items():
        path = folder / f"{caption.split()[-1]}.png"
        picture.save(path)
        path.with_suffix(".txt").write_text(caption + "\n", encoding="utf-8")
    return pictures


def draw_ball(above: str, below: str) -> Image.Image:
    """A red and white striped ball where the two halves of the background meet."""
    scale = 4  # drawn larger and shrunk, for smooth edges
    side = SIDE * scale
    image = Image.new("RGB", (side, side), above)
    ImageDraw.Draw(image).rectangle((0, side * 6 // 10, side, side), fill=below)
    ball = Image.new("RGB", (side, side), "white")
    stripes = ImageDraw.Draw(ball)
    for left in range(-side, 2 * side, side // 5):
        stripes.line((left, side, left + side // 2, 0), fill="#d62828", width=side // 11)
    outline = Image.new("L", (side, side), 0)
    circle = (side // 4, side // 4, side * 3 // 4, side * 3 // 4)
    ImageDraw.Draw(outline).ellipse(circle, fill=255)
    image.paste(ball, mask=outline)
    ImageDraw.Draw(image).ellipse(circle, outline="#222222", width=scale)
    return image.resize((SIDE, SIDE), Image.Resampling.LANCZOS)


# Training


def train(model_dir: Path, pictures_dir: Path, lora_dir: Path, max_train_steps: int) -> None:
    """The command that a user would type, with settings that move a tiny random model within a minute."""
    settings = {
        "pretrained_model_name_or_path": model_dir,
        "instance_data_dir": pictures_dir,
        "output_dir": lora_dir,
        "resolution": SIDE,
        "max_sequence_length": MAX_SEQUENCE_LENGTH,
        "teacher_prompt_suffix": TEACHER_PROMPT_SUFFIX,
        "num_rollout_steps": NUM_STEPS,
        "rank": 16,
        "learning_rate": 5e-3,
        "lr_scheduler": "cosine",
        "max_train_steps": max_train_steps,
        "validation_steps": max(1, max_train_steps // 4),
        "num_validation_images": 2,
        "seed": 0,
    }
    launch = ["launch", "--cpu", "--num_processes", "1", "--num_machines", "1", "--dynamo_backend", "no"]
    launch += ["--mixed_precision", "no", str(REPOSITORY / "train_dopsd_flux2.py")]
    flags = [[f"--{name}", str(value)] for name, value in settings.items()]
    print(" \\\n  ".join(["accelerate " + shlex.join(launch), *map(shlex.join, flags)]), flush=True)
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", *launch, *sum(flags, [])]
    finished = subprocess.run(command, check=False)
    if finished.returncode:
        sys.exit(f"The training command above failed with exit status {finished.returncode}")


def read_losses(lora_dir: Path) -> list[float]:
    """The loss of every step, from the training's tensorboard log."""
    (log_dir,) = (lora_dir / "logs").iterdir()
    events = EventAccumulator(str(log_dir))
    events.Reload()
    return [event.value for event in events.Scalars("loss")]


# Samples


@dataclass(frozen=True)
class Sample:
    latents: torch.Tensor
    image: Image.Image


def sample(pipeline: Flux2KleinPipeline, prompt: str, *, seed: int, image: Image.Image | None = None) -> Sample:
    """What the deployed pipeline draws; the same seed is the same noise, with and without a reference image."""
    latents = pipeline(
        prompt=prompt,
        image=image,
        height=SIDE,
        width=SIDE,
        num_inference_steps=NUM_STEPS,
        guidance_scale=1.0,
        generator=torch.Generator().manual_seed(seed),
        max_sequence_length=MAX_SEQUENCE_LENGTH,
        output_type="latent",
    ).images
    with torch.no_grad():
        decoded = pipeline.vae.decode(latents, return_dict=False)[0]
    return Sample(latents, pipeline.image_processor.postprocess(decoded)[0])


def remaining_distance(base: Sample, student: Sample, teacher: Sample) -> float:
    """||student - teacher|| / ||base - teacher|| of the final latents: 1 before training, 0 at the teacher."""
    return ((student.latents - teacher.latents).norm() / (base.latents - teacher.latents).norm()).item()


def report(rows: list[Row], lora_dir: Path, model_dir: Path, sheet_path: Path) -> None:
    print("Distance of the final latents to the teacher's, before training = 1:")
    for row in rows:
        print(f"  {row.distance:.2f}  {row.caption}")
    print(f"  {mean_distance(rows):.2f}  mean")
    caption = rows[0].caption
    print(f"""
LoRA:    {lora_dir / "pytorch_lora_weights.safetensors"}
Picture: {sheet_path}

The LoRA in your own Python:

from diffusers import Flux2KleinPipeline
pipe = Flux2KleinPipeline.from_pretrained({str(model_dir)!r})
pipe.load_lora_weights({str(lora_dir)!r})
image = pipe(prompt={caption!r}, height={SIDE}, width={SIDE}, num_inference_steps={NUM_STEPS},
             guidance_scale=1.0, max_sequence_length={MAX_SEQUENCE_LENGTH}).images[0]
image.save("ball.png")""")


if __name__ == "__main__":
    main()
