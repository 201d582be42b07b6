"""What a run draws and when: preview, validation, rollout, retention, and the story of the whole run."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from diffusers.training_utils import offload_models
from PIL import Image
from tqdm.auto import tqdm

from .contexts import Contexts
from .data.order import Sample
from .data.training_data import Crop
from .history import log_metrics, read_history
from .model import Context, FewStepPipeline, TeacherContext
from .output import reporting_write_errors
from .roles import StudentTeacherLoRA
from .rollout import RolloutStep, rollout, seeded_noise
from .settings import Settings, ValidationSettings
from .sheets import Cell, contact_sheet, plot_curves, save_png, stack


logger = get_logger(__name__)

NUM_PREVIEW_PICTURES = 4
MAX_STORY_COLUMNS = 4  # besides the base model's

Row = tuple[str, list[Image.Image | None]]  # a label, and one image per column


@dataclass(frozen=True)
class Drawing:
    """An image and the latents that it was decoded from."""

    latents: torch.Tensor  # for `FewStepPipeline.decode`, one sample, on the CPU
    image: Image.Image


@dataclass(frozen=True)
class Sheet:
    """The content of one contact sheet; see `sheets.contact_sheet`."""

    title: str
    columns: list[str]
    rows: list[Row]
    note: str

    def draw(self) -> Image.Image:
        rows = [(label, [*map(Cell, images)]) for label, images in self.rows]
        return contact_sheet(self.title, self.columns, rows, note=self.note)


def drawn_prompts(settings: ValidationSettings) -> list[str]:
    """Every prompt that the gallery draws."""
    if settings.validation_steps == 0:
        return []
    final = [settings.final_validation_prompt] if settings.final_validation_prompt else []
    return [*settings.validation_prompt, *final, *settings.retention_prompts]


class Gallery:
    """Draws with base, student and teacher at the deployed number of steps; writes contact sheets and curves.

    Every image is what the stock pipeline draws from the same noise with the saved LoRA. Drawing touches neither the
    weights nor the random generators that training uses.

    Args:
        settings: resolved.
        accelerator: sheets go to its trackers too.
        pipeline, roles, contexts: used to draw images.
        teacher_context: what the teacher sees.
        save_dtype: of the saved LoRA.
    """

    def __init__(
        self,
        settings: Settings,
        accelerator: Accelerator,
        *,
        pipeline: FewStepPipeline,
        roles: StudentTeacherLoRA,
        contexts: Contexts,
        teacher_context: TeacherContext,
        save_dtype: torch.dtype,
    ):
        self.settings, self.folder = settings.validation, Path(settings.training.output_dir)
        self.num_rollout_steps = settings.distillation.num_rollout_steps
        self.last_step = settings.training.max_train_steps
        self.accelerator, self.pipeline, self.roles, self.contexts = accelerator, pipeline, roles, contexts
        self.data = contexts.data
        self.teacher_context = teacher_context
        self.save_dtype = save_dtype
        self.base_drawings: dict[tuple[str, int], Drawing] = {}  # (prompt, seed): drawn once
        # (step, prompt, seed) -> the student's image, for validation prompts at seed 0 and for retention prompts
        self.story: dict[tuple[int, str, int], Image.Image] = {}
        self.card_images: list[tuple[str, str]] = []  # (prompt, path in the output folder)
        first_example_of: dict[int, int] = {}  # picture -> example
        for index, example in enumerate(self.data.examples):
            first_example_of.setdefault(example.picture, index)
        self.shown = [
            Sample(example=index, epoch=0, caption=0, flip=False)
            for index in sorted(first_example_of.values())[:NUM_PREVIEW_PICTURES]
        ]

    # When to draw

    def is_due(self, step: int) -> bool:
        """Whether to validate after `step` steps."""
        every = self.settings.validation_steps
        return every > 0 and (step % every == 0 or step == self.last_step)

    def draw_before_training(self, first_step: int) -> None:
        """Draws the preview of a new run; for a resumed run, the validation that its interruption cut short."""
        if self.settings.validation_steps == 0:
            return
        if first_step == 0 and self.accelerator.is_main_process:
            try:
                self.draw_preview()
            except Exception:
                if self.settings.preview_only:
                    raise
                logger.exception("The preview failed; training continues")
        history = read_history(self.folder)
        is_drawn = any(line["step"] == first_step and "retention" in line for line in history)
        if first_step > 0 and self.is_due(first_step) and not is_drawn:
            self.validate(first_step)

    def validate(self, step: int) -> None:
        """Draws validation sheets and logs retention. An error while drawing does not end the run."""
        if self.accelerator.is_main_process:
            try:
                self.draw_validation(step)
                self.draw_rollout(step)
                log_metrics(self.accelerator, self.folder, step, {"retention": self.draw_retention(step)})
            except Exception:
                logger.exception(f"Validation at step {step} failed; training continues")

    # Drawing

    def noise(self, height: int, width: int, seed: int) -> torch.Tensor:
        """(1, C, h, w) noise: in float32, what a pipeline draws from `torch.Generator().manual_seed(seed)`."""
        noise = seeded_noise(self.pipeline.latent_shape(height, width), [seed])
        return noise.to(self.accelerator.device, self.pipeline.latents_dtype)

    def draw(self, context: Context, noise: torch.Tensor) -> Drawing:
        latents = self.pipeline.sample(context, noise, self.settings.num_inference_steps)
        return Drawing(latents.cpu(), self.decode(latents)[0])

    def decode(self, latents: torch.Tensor) -> list[Image.Image]:
        """Decodes with the VAE on the accelerator for the time of the call."""
        with offload_models(self.pipeline.vae, device=self.accelerator.device, offload=True):
            return self.pipeline.decode(latents)

    def draw_prompt(self, prompt: str, seed: int) -> Drawing:
        noise = self.noise(self.settings.validation_height, self.settings.validation_width, seed)
        return self.draw(self.contexts.student([prompt]), noise)

    def base_drawing(self, prompt: str, seed: int) -> Drawing:
        if (prompt, seed) not in self.base_drawings:
            with self.roles.base_role():
                self.base_drawings[prompt, seed] = self.draw_prompt(prompt, seed)
        return self.base_drawings[prompt, seed]

    def student_drawing(self, prompt: str, seed: int) -> Drawing:
        with self.roles.shipped_role(self.save_dtype):
            return self.draw_prompt(prompt, seed)

    def write(self, name: str, step: int, *sheets: Sheet) -> None:
        """Writes contact sheets, below each other, as one PNG and to the trackers."""
        image = stack([sheet.draw() for sheet in sheets], 0)
        path = self.folder / f"{name}.png"
        with reporting_write_errors(self.folder, path.name):
            save_png(image, path)
        for tracker in self.accelerator.trackers:
            if tracker.name in ("tensorboard", "wandb"):
                options = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images({name.partition("-")[0]: np.asarray(image)[None]}, step=step, **options)
        logger.info(f"Wrote {path}")

    # Sheets

    def draw_preview(self) -> None:
        """Before the first step: what the teacher draws. The student cannot learn more than that."""
        rows = [self.preview_row(seed, sample) for seed, sample in enumerate(progress(self.shown, "Preview"))]
        has_pictures = len(rows[0][1]) == 3
        remedy = (
            "--teacher_context, --teacher_prompt_suffix, --resolution or the pictures"
            if self.contexts.conditioning.teacher_sees_picture
            else "the teacher's captions"
        )
        sheet = Sheet(
            f"Before training, drawn in {self.settings.num_inference_steps} sampling steps",
            ["base", f"teacher: {self.teacher_context.description}", *(["the picture"] if has_pictures else [])],
            rows,
            "The student is pulled from the base's column towards the teacher's. If the teacher's does not show "
            f"what you want, training cannot teach it: change {remedy} before you spend hours.",
        )
        self.write("preview", 0, sheet)

    def preview_row(self, seed: int, sample: Sample) -> Row:
        noise = self.noise(*self.data.bucket(sample), seed)
        caption, teacher_caption = self.data.caption(sample), self.data.picture(sample).teacher_caption
        with self.roles.base_role():
            base = self.draw(self.contexts.student([caption]), noise)
        with self.roles.teacher_role():
            teacher = self.draw(self.contexts.teacher([sample]), noise)
        label = caption if teacher_caption is None else f"{caption} (teacher: {teacher_caption})"
        picture = self.data.cropped(Crop(sample.example, sample.flip))
        return label, [base.image, teacher.image, *([] if picture is None else [picture])]

    def draw_validation(self, step: int) -> None:
        """The validation prompts, with the base model and with the student as it would be saved."""
        prompts = list(self.settings.validation_prompt)
        if step == self.last_step and self.settings.final_validation_prompt:
            prompts.append(self.settings.final_validation_prompt)
        seeds = range(self.settings.num_validation_images)
        rows: list[Row] = []
        for prompt in progress(prompts, "Validation"):
            bases = [self.base_drawing(prompt, seed).image for seed in seeds]
            students = [self.student_drawing(prompt, seed).image for seed in seeds]
            rows += [(f"base: {prompt}", bases), (f"student: {prompt}", students)]
            self.story[step, prompt, 0] = students[0]
            if step == self.last_step:
                self.keep_for_card(prompt, students[0])
        sheet = Sheet(
            f"After training step {step}, drawn in {self.settings.num_inference_steps} sampling steps",
            [f"seed {seed}" for seed in seeds],
            rows,
            "A column starts from the same noise. Look for your subject, and for edges as sharp as the base's.",
        )
        self.write(f"validation-{step}", step, sheet)

    def keep_for_card(self, prompt: str, image: Image.Image) -> None:
        name = f"images/validation_{len(self.card_images)}.png"
        (self.folder / "images").mkdir(exist_ok=True)
        save_png(image, self.folder / name)
        self.card_images.append((prompt, name))

    def draw_rollout(self, step: int) -> None:
        """The clean images that student and teacher predict at each state that the student visits."""
        sample = self.shown[0]
        states = self.rollout(sample)
        students = [self.decode(self.pipeline.image_latents(state.student_x0))[0] for state in states]
        teachers = [self.decode(self.pipeline.image_latents(state.teacher_x0))[0] for state in states]
        sheet = Sheet(
            f"After training step {step}: the clean picture implied at each visited state, noisiest first",
            [f"sigma {float(state.sigma):.3f}" for state in states],
            [("student", students), ("teacher", teachers)],
            f"Caption: {self.data.caption(sample)}. The loss is the distance between the two rows.",
        )
        self.write(f"rollout-{step}", step, sheet)

    def rollout(self, sample: Sample) -> list[RolloutStep]:
        bucket = self.data.bucket(sample)
        student_context, teacher_context = self.contexts.load([sample])
        schedule = self.pipeline.schedule(*bucket, self.num_rollout_steps, self.accelerator.device)
        with self.roles.shipped_role(self.save_dtype):
            states = rollout(
                partial(self.pipeline.predict_velocity, context=student_context),
                self.roles.as_teacher(partial(self.pipeline.predict_velocity, context=teacher_context)),
                self.noise(*bucket, 0),
                schedule,
            )
            return list(states)

    def draw_retention(self, step: int) -> float:
        """The retention prompts, which should look as before. Returns `relative_drift` of the student's latents."""
        prompts = self.settings.retention_prompts
        bases, students = [], []
        for seed, prompt in enumerate(progress(prompts, "Retention")):
            bases.append(self.base_drawing(prompt, seed))
            students.append(self.student_drawing(prompt, seed))
            self.story[step, prompt, seed] = students[-1].image
        retention = relative_drift(
            torch.cat([drawing.latents for drawing in bases]), torch.cat([drawing.latents for drawing in students])
        )
        sheet = Sheet(
            f"After training step {step}: prompts that have nothing to do with it, retention {retention:.3f}",
            prompts,
            [("base", [drawing.image for drawing in bases]), ("student", [drawing.image for drawing in students])],
            "A column starts from the same noise. Retention 0: drawn as before. 1: as unlike the base's picture as "
            "another prompt's picture is.",
        )
        self.write(f"retention-{step}", step, sheet)
        return retention

    def draw_story(self) -> None:
        """After the last step: the whole run on one sheet, and its curves. An error does not end the run."""
        if not self.story:
            return
        try:
            self.write("story", self.last_step, *self.story_sheets())
            plot_curves(read_history(self.folder), self.folder / "curves.png", title=self.folder.name)
            logger.info(f"Wrote {self.folder / 'curves.png'}")
        except Exception:
            logger.exception("The story could not be drawn; the LoRA is saved")

    def story_sheets(self) -> list[Sheet]:
        steps = evenly_spaced(sorted({step for step, *_ in self.story}), MAX_STORY_COLUMNS)
        columns = ["base", *(f"after step {step}" for step in steps)]

        def row(prompt: str, seed: int) -> Row:
            students = [self.story.get((step, prompt, seed)) for step in steps]
            return prompt, [self.base_drawing(prompt, seed).image, *students]

        validation = Sheet(
            f"{self.folder.name}: {self.last_step} training steps, drawn in {self.settings.num_inference_steps} "
            "sampling steps",
            columns,
            [row(prompt, 0) for prompt in self.settings.validation_prompt],
            "Validation prompts. Each row starts from the same noise.",
        )
        crops = [self.data.cropped(Crop(sample.example, sample.flip)) for sample in self.shown]
        pictures = [picture for picture in crops if picture is not None]
        training = Sheet("The training pictures", [""] * len(pictures), [("", pictures)], "")
        retention = Sheet(
            "Prompts that have nothing to do with the training",
            columns,
            [row(prompt, seed) for seed, prompt in enumerate(self.settings.retention_prompts)],
            "These should stay as the base draws them.",
        )
        return [validation, *([training] if pictures else []), retention]


def progress(items: list, description: str) -> Iterator:
    return tqdm(items, desc=description, leave=False)


def evenly_spaced(items: list[int], count: int) -> list[int]:
    """At most `count` of the items, the first and the last among them."""
    if len(items) <= count:
        return items
    return [items[round(place * (len(items) - 1) / (count - 1))] for place in range(count)]


def relative_drift(base: torch.Tensor, student: torch.Tensor) -> float:
    """Mean distance of the student's latents from the base's, relative to the mean distance between the base's own.

    0: nothing has changed. 1: as different as another prompt's image.

    Args:
        base, student: (N, ...), N at least 2; row i of both is drawn from the same prompt and noise.
    """
    base, student = base.float().flatten(1), student.float().flatten(1)
    moved = (student - base).norm(dim=1).mean()
    apart = torch.nn.functional.pdist(base).mean()
    return (moved / apart).item()
