"""Teaches the miniature new concepts by D-OPSD and by what it is compared with, and measures what came of it.

    python benchmarks/miniature/experiment.py --model benchmarks/miniature/model --output_dir miniature-results

A stopped experiment goes on where it was when the command is given again: every run leaves a `result.json`. `--quick`
is one concept, one seed, and the methods of the first table. D-OPSD runs are `train_dopsd_flux2.py` itself.
"""

import argparse
import json
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "quickstart"))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import matplotlib.pyplot as plt
import numpy as np
import torch
from diffusers import Flux2KleinPipeline
from PIL import Image
from tqdm.auto import tqdm

import world
from baselines import encode_lesson, train_baseline
from exam import Task, measure, sample
from metrics import PictureReader
from parts import MAX_SEQUENCE_LENGTH, NUM_STEPS
from pipelines.adapters import StudentTeacherLoRA, lora_target_modules
from pipelines.flux2_klein import DEFAULT_LORA_LAYERS, Flux2KleinDOPSDPipeline
from pipelines.rollout import seeded_noise
from pipelines.sheets import Cell, contact_sheet, save_png, stack
from train_dopsd_flux2 import relative_drift
from vae import to_tensor


REPOSITORY = Path(__file__).resolve().parents[2]
SEEDS = (0, 1, 2)
RANK = 16
LEARNING_RATE = 1e-3
NUM_TRAIN_STEPS = 400
NUM_PICTURES = 4
EVAL_COUNT = 96  # pictures of each kind
SHEET_CELL_PIXELS = 192
STEPS_PER_EXAM = 10  # between looks at an SFT run that is to stop at an accuracy


@dataclass(frozen=True)
class Concept:
    """What is taught: an object under a word that the base has never seen, and the backgrounds of its pictures.

    Its prompts in the exam name the backgrounds that no training picture shows.
    """

    name: str
    word: str
    appearance: world.Appearance
    backgrounds: tuple[str, str]

    @property
    def other_backgrounds(self) -> list[str]:
        return [name for name in world.BACKGROUNDS if name not in self.backgrounds]


CONCEPTS = (
    Concept("object", "zofu", world.Appearance("heart", "dotted", ("yellow", "blue")), ("sand", "sky")),
    Concept("texture", "kebi", world.Appearance("disc", "slanted", ("red", "white")), ("mint", "stone")),
    Concept("two-colour", "vupa", world.Appearance("ring", "checked", ("yellow", "black")), ("rose", "sand")),
)


@dataclass(frozen=True)
class Method:
    """One way to train: a baseline's name, or "dopsd" with flags of the script."""

    name: str
    kind: str = "dopsd"
    flags: dict = field(default_factory=dict)
    stops_at_dopsd: bool = False


FIRST_TABLE = (
    Method("D-OPSD"),
    Method("SFT", "sft"),
    Method("SFT, stopped", "sft", stops_at_dopsd=True),
)
ABLATIONS = (
    Method("SFT on teacher's samples", "sft_teacher"),
    Method("off-policy", "off_policy"),
    Method("teacher: live", flags={"teacher": "student"}),
    Method("teacher: EMA 0.9", flags={"ema_decay": 0.9}),
    Method("teacher: EMA 0.99", flags={"ema_decay": 0.99}),
    Method("teacher: base", flags={"teacher": "base"}),
    Method("velocity loss", flags={"loss_space": "velocity"}),
)


def pictures_of(concept: Concept, seed: int) -> tuple[list[Image.Image], list[str]]:
    """The training pictures, each at a pose of its own, and their captions."""
    random = np.random.default_rng([20, seed])
    poses = random.permutation(len(world.POSES))[:NUM_PICTURES]
    images, captions = [], []
    for index, pose in enumerate(poses):
        background = concept.backgrounds[index % len(concept.backgrounds)]
        pixels = world.draw(world.sprite(concept.appearance), world.POSES[pose], background, random)
        images.append(world.to_image(pixels))
        captions.append(world.caption(concept.word, background))
    return images, captions


def write_pictures(folder: Path, images: list[Image.Image], captions: list[str]) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for index, (image, caption) in enumerate(zip(images, captions, strict=True)):
        image.save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(caption)


def concept_task(concept: Concept, count: int, *, references: list[Image.Image] = ()) -> Task:
    """The new word on backgrounds that the training pictures lack; with references, asked of the teacher."""
    random = np.random.default_rng(21)
    backgrounds = [concept.other_backgrounds[index % 3] for index in range(count)]
    suffix = world.REFERENCE_SUFFIX if references else ""
    return Task(
        prompts=[world.caption(concept.word, background) + suffix for background in backgrounds],
        references=[references[index % len(references)] for index in range(count)] if references else [],
        wanted=[concept.appearance] * count,
        backgrounds=backgrounds,
        real=real_pictures([concept.appearance] * count, backgrounds, random),
    )


def old_task(count: int) -> Task:
    """Objects that the base knows, by their words."""
    random = np.random.default_rng(22)
    known = [appearance for appearance in world.all_appearances() if not appearance.is_held_out]
    wanted = [known[index] for index in random.integers(len(known), size=count)]
    names = list(world.BACKGROUNDS)
    backgrounds = [names[index] for index in random.integers(len(names), size=count)]
    return Task(
        prompts=[world.caption(a.words, b) for a, b in zip(wanted, backgrounds, strict=True)],
        references=[],
        wanted=wanted,
        backgrounds=backgrounds,
        real=real_pictures(wanted, backgrounds, random),
    )


def real_pictures(
    appearances: list[world.Appearance], backgrounds: list[str], random: np.random.Generator
) -> torch.Tensor:
    """(N, 3, 64, 64)."""
    pixels = [
        world.draw(world.sprite(appearance), world.POSES[random.integers(len(world.POSES))], background, random)
        for appearance, background in zip(appearances, backgrounds, strict=True)
    ]
    return to_tensor(np.stack(pixels))


class Examiner:
    """Measures pipelines on a concept and on what they knew before."""

    def __init__(self, model: Path, count: int):
        self.model, self.count = model, count
        self.reader = PictureReader(world.all_appearances())
        self.old = old_task(count)

    def load(self) -> Flux2KleinDOPSDPipeline:
        return Flux2KleinDOPSDPipeline.from_pretrained(self.model)

    @cached_property
    def base_latents(self) -> torch.Tensor:
        return old_latents(self.load(), self.old)

    def examine(self, pipeline: Flux2KleinDOPSDPipeline, concept: Concept) -> dict:
        """The figures of one model: of the concept, of old prompts, and retention as training measures it."""
        task = concept_task(concept, self.count)
        return {
            "new": measure(sample(pipeline, task), task, self.reader),
            "old": measure(sample(pipeline, self.old), self.old, self.reader),
            "retention": relative_drift(self.base_latents, old_latents(pipeline, self.old)),
        }

    def examine_teacher(self, concept: Concept, references: list[Image.Image]) -> dict:
        """The base model where it sees a picture."""
        task = concept_task(concept, self.count, references=references)
        return {"new": measure(sample(self.load(), task), task, self.reader)}

    def concept_accuracy(self, pipeline: Flux2KleinDOPSDPipeline, concept: Concept) -> float:
        task = concept_task(concept, self.count)
        return measure(sample(pipeline, task), task, self.reader)["exact"]


@torch.no_grad()
def old_latents(pipeline: Flux2KleinDOPSDPipeline, task: Task, count: int = 16) -> torch.Tensor:
    """Final latents of the first prompts."""
    context = pipeline.encode_student(task.prompts[:count], max_sequence_length=MAX_SEQUENCE_LENGTH)
    noise = seeded_noise(pipeline.latent_shape(world.SIDE, world.SIDE), list(range(count)))
    return pipeline.sample(context, noise, NUM_STEPS)


# Runs


@dataclass(frozen=True)
class Experiment:
    """Runs of methods on concepts, each in a folder of its own below `folder`."""

    model: Path
    folder: Path
    num_steps: int
    examiner: Examiner

    def run_folder(self, concept: Concept, seed: int, method: Method) -> Path:
        name = "".join(letter if letter.isalnum() or letter in ".-" else "_" for letter in method.name)
        return self.folder / "runs" / concept.name / str(seed) / name

    def result(self, concept: Concept, seed: int, method: Method) -> dict:
        """The run's figures, trained and measured if they are not there yet."""
        folder = self.run_folder(concept, seed, method)
        path = folder / "result.json"
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            steps = self.train(concept, seed, method, folder)
            pipeline = self.examiner.load()
            pipeline.load_lora_weights(folder)
            result = self.examiner.examine(pipeline, concept) | {"steps": steps}
            unfinished = path.with_suffix(".tmp")
            unfinished.write_text(json.dumps(result, indent=2))
            unfinished.replace(path)
        return json.loads(path.read_text())

    def train(self, concept: Concept, seed: int, method: Method, folder: Path) -> int:
        """Leaves the run's LoRA in the folder; returns the steps that it took."""
        images, captions = pictures_of(concept, seed)
        if method.kind == "dopsd":
            write_pictures(folder / "pictures", images, captions)
            subprocess.run(dopsd_command(self.model, folder, seed, self.num_steps, method.flags), check=True)
            return self.num_steps
        target = None
        if method.stops_at_dopsd:
            target = self.result(concept, seed, FIRST_TABLE[0])["new"]["exact"]
        return self.train_baseline(concept, seed, method.kind, images, captions, folder, stop_at=target)

    def train_baseline(
        self,
        concept: Concept,
        seed: int,
        kind: str,
        images: list[Image.Image],
        captions: list[str],
        folder: Path,
        *,
        stop_at: float | None,
    ) -> int:
        pipeline = self.examiner.load()
        lesson = encode_lesson(
            pipeline,
            images,
            captions,
            prompt_suffix=world.REFERENCE_SUFFIX,
            max_sequence_length=MAX_SEQUENCE_LENGTH,
        )
        torch.manual_seed(seed)
        targets = lora_target_modules(pipeline.transformer, DEFAULT_LORA_LAYERS)
        roles = StudentTeacherLoRA(pipeline.transformer, targets, rank=RANK, alpha=2 * RANK)
        bar = tqdm(total=self.num_steps, desc=f"{concept.name} {seed} {kind}", leave=False)
        done = 0

        def after_step(step: int) -> bool:
            nonlocal done
            done = step
            bar.update()
            if stop_at is None or step % STEPS_PER_EXAM:
                return False
            with roles.shipped_role(torch.float32):
                return self.examiner.concept_accuracy(pipeline, concept) >= stop_at

        train_baseline(
            kind,
            pipeline,
            roles,
            lesson,
            size=(world.SIDE, world.SIDE),
            num_steps=self.num_steps,
            num_rollout_steps=NUM_STEPS,
            learning_rate=LEARNING_RATE,
            ema_decay=0.9999,
            seed=seed,
            after_step=after_step,
        )
        bar.close()
        weights, metadata = roles.export(torch.float32)
        Flux2KleinPipeline.save_lora_weights(
            folder, transformer_lora_layers=weights, transformer_lora_adapter_metadata=metadata
        )
        return done


def dopsd_command(model: Path, folder: Path, seed: int, num_steps: int, flags: dict) -> list[str]:
    """The training script, on the run's pictures, with the settings that the baselines share."""
    settings = {
        "pretrained_model_name_or_path": model,
        "instance_data_dir": folder / "pictures",
        "output_dir": folder,
        "teacher_prompt_suffix": world.REFERENCE_SUFFIX,
        "resolution": world.SIDE,
        "max_sequence_length": MAX_SEQUENCE_LENGTH,
        "rank": RANK,
        "learning_rate": LEARNING_RATE,
        "max_train_steps": num_steps,
        "train_batch_size": NUM_PICTURES,
        "checkpointing_steps": 100,
        "checkpoints_total_limit": 1,
        "resume_from_checkpoint": "latest",
        "mixed_precision": "no",
        "validation_steps": 0,
        "report_to": "none",
        "seed": seed,
        **flags,
    }
    words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    return [sys.executable, str(REPOSITORY / "train_dopsd_flux2.py"), *words]


# Reports

COLUMNS = {
    "concept": ("new", "exact"),
    "follows the prompt": ("new", "background"),
    "detail": ("new", "detail"),
    "FD": ("new", "fd"),
    "places": ("new", "poses"),
    "old: exact": ("old", "exact"),
    "old: detail": ("old", "detail"),
    "old: FD": ("old", "fd"),
    "old: places": ("old", "poses"),
    "retention": ("retention", None),
}
COLUMNS_NOTE = """\
Mean and standard deviation over concepts and seeds, at the deployed steps. concept: shape, texture and colours of the
new object are right, asked for on backgrounds that no training picture shows. follows the prompt: so is the
background. detail: amplitude of the grain, real pictures = 1. FD: Frechet distance of random features to real
pictures, lower is better. places: effective number of the objects' places, of 16. old: the same for objects that the
base knows. retention: as training logs it, 0 = unchanged."""


def figure(result: dict, column: str) -> float | None:
    part, name = COLUMNS[column]
    value = result.get(part)
    return value if name is None or value is None else value.get(name)


def spread(results: list[dict], column: str) -> str:
    """Mean and standard deviation, or a dash where nothing was measured."""
    values = [value for value in (figure(result, column) for result in results) if value is not None]
    if not values:
        return "-"
    digits = 1 if "places" in column else 3 if "FD" in column else 2
    deviation = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{deviation}"


def table(rows: dict[str, list[dict]]) -> str:
    """Markdown, a row a method."""
    lines = ["| | steps | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 2) + "|"]
    for name, results in rows.items():
        steps = [result["steps"] for result in results if "steps" in result]
        cells = [f"{np.mean(steps):.0f}" if steps else "-", *(spread(results, column) for column in COLUMNS)]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(rows: dict[str, list[dict]], path: Path) -> None:
    """What was learned against what was kept: a point a run, a larger one their mean."""
    panels = [("detail", "few-step detail of the new object"), ("old: exact", "accuracy on old prompts")]
    panels += [("old: detail", "few-step detail on old prompts"), ("retention", "drift on old prompts")]
    drawing, axes = plt.subplots(1, len(panels), figsize=(4.2 * len(panels), 4.4), layout="constrained")
    for axis, (column, title) in zip(axes, panels, strict=True):
        for index, (name, results) in enumerate(rows.items()):
            points = [(figure(result, "concept"), figure(result, column)) for result in results]
            points = np.array([point for point in points if None not in point])
            if len(points):
                colour = f"C{index % 10}"
                axis.scatter(*points.T, s=12, alpha=0.4, color=colour)
                axis.scatter(*points.mean(0), s=90, color=colour, label=name, marker="o" if index < 10 else "s")
        axis.set(xlabel="accuracy on the new concept", ylabel=title, xlim=(-0.03, 1.03))
    axes[0].legend(fontsize=8)
    drawing.savefig(path, dpi=110)
    plt.close(drawing)


@torch.no_grad()
def draw(
    pipeline: Flux2KleinDOPSDPipeline,
    prompt: str,
    seed: int,
    *,
    reference: Image.Image | None = None,
) -> Image.Image:
    """One picture as the pipeline draws it."""
    context = pipeline.encode_student([prompt], max_sequence_length=MAX_SEQUENCE_LENGTH)
    if reference is not None:
        context = context.with_references(pipeline.encode_reference(reference))
    noise = seeded_noise(pipeline.latent_shape(world.SIDE, world.SIDE), [seed])
    return pipeline.decode(pipeline.sample(context, noise, NUM_STEPS))[0]


def write_sheet(experiment: Experiment, concepts: list[Concept], seed: int, path: Path) -> None:
    """New prompts: base, teacher with the picture, SFT, D-OPSD, a training picture; old prompts below."""
    dopsd, sft = FIRST_TABLE[:2]
    sheets = []
    for concept in concepts:
        images, _ = pictures_of(concept, seed)
        pipelines = {"base": experiment.examiner.load(), "SFT": experiment.examiner.load()}
        pipelines["D-OPSD"] = experiment.examiner.load()
        pipelines["SFT"].load_lora_weights(experiment.run_folder(concept, seed, sft))
        pipelines["D-OPSD"].load_lora_weights(experiment.run_folder(concept, seed, dopsd))
        rows = []
        for number, background in enumerate(concept.other_backgrounds):
            prompt = world.caption(concept.word, background)
            teacher = draw(pipelines["base"], prompt + world.REFERENCE_SUFFIX, number, reference=images[number])
            drawn = {name: draw(pipeline, prompt, number) for name, pipeline in pipelines.items()}
            rows.append((prompt, [drawn["base"], teacher, drawn["SFT"], drawn["D-OPSD"], images[number]]))
        sheets.append(
            contact_sheet(
                f"{concept.name}: the word {concept.word!r} was taught from {NUM_PICTURES} pictures",
                ["base", "teacher: sees a picture", "SFT", "D-OPSD", "a picture"],
                [(label, [*map(Cell, cells)]) for label, cells in rows],
                note="Backgrounds that no training picture shows. A row starts from the same noise.",
                cell_pixels=SHEET_CELL_PIXELS,
            )
        )
        rows = []
        for number, prompt in enumerate(experiment.examiner.old.prompts[:2]):
            drawn = {name: draw(pipeline, prompt, number) for name, pipeline in pipelines.items()}
            rows.append((prompt, [drawn["base"], None, drawn["SFT"], drawn["D-OPSD"], None]))
        sheets.append(
            contact_sheet(
                "Old prompts: these should stay as the base draws them",
                ["base", "", "SFT", "D-OPSD", ""],
                [(label, [*map(Cell, cells)]) for label, cells in rows],
                cell_pixels=SHEET_CELL_PIXELS,
            )
        )
    save_png(stack(sheets, 0), path)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path(__file__).parent / "model", help="The miniature's folder.")
    parser.add_argument("--output_dir", type=Path, default=Path("miniature-results"), help="Runs, tables and sheets.")
    parser.add_argument("--num_train_steps", type=int, default=NUM_TRAIN_STEPS, help="Of every run.")
    parser.add_argument("--quick", action="store_true", help="One concept, one seed, the first table.")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    experiment = Experiment(
        args.model.resolve(), args.output_dir.resolve(), args.num_train_steps, Examiner(args.model, EVAL_COUNT)
    )
    experiment.folder.mkdir(parents=True, exist_ok=True)
    concepts, seeds = (CONCEPTS[:1], SEEDS[:1]) if args.quick else (CONCEPTS, SEEDS)
    pairs = [(concept, seed) for concept in concepts for seed in seeds]
    examiner = experiment.examiner
    base = {concept: examiner.examine(examiner.load(), concept) for concept in concepts}
    first = {
        "base": list(base.values()),
        "teacher (base with the picture)": [
            examiner.examine_teacher(concept, pictures_of(concept, seed)[0]) for concept, seed in pairs
        ],
    }
    for method in FIRST_TABLE:
        jobs = tqdm(pairs, desc=method.name)
        first[method.name] = [experiment.result(concept, seed, method) for concept, seed in jobs]
    text = [f"# First table\n\n{table(first)}\n\n{COLUMNS_NOTE}"]
    plot(first, experiment.folder / "first_table.png")
    if not args.quick:
        concept = CONCEPTS[0]
        ablation = {
            method.name: [experiment.result(concept, seed, method) for seed in tqdm(seeds, desc=method.name)]
            for method in (*FIRST_TABLE[:2], *ABLATIONS)
        }
        text.append(f"# Ablations, concept {concept.name!r}\n\n{table(ablation)}")
        plot(ablation, experiment.folder / "ablations.png")
    (experiment.folder / "results.md").write_text("\n\n".join(text) + "\n")
    write_sheet(experiment, list(concepts), seeds[0], experiment.folder / "sheet.png")
    print("\n\n".join(text))


if __name__ == "__main__":
    main()
