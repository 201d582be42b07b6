"""What a run draws and when: preview, validation, rollout, retention, and the story of the whole run."""

from collections.abc import Callable, Collection, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.tracking import GeneralTracker
from accelerate.utils import broadcast_object_list, gather_object
from diffusers.training_utils import offload_models
from PIL import Image
from tqdm.auto import tqdm

from .contexts import Contexts
from .data.order import Sample
from .data.training_data import Crop
from .errors import DOPSDError, one_line
from .history import MetricsLog, read_history
from .html_report import RunReport, State
from .memory import reset_peak_memory
from .model import Context, FewStepPipeline, Model
from .output import naming_file
from .prior import PriorPrompts
from .retention import distances, mean_distance
from .roles import StudentTeacherLoRA
from .rollout import RolloutStep, rollout, seeded_noise
from .settings import Settings
from .sharding import calls_must_match
from .sheets import Cell, contact_sheet, save_png, stack
from .stopping import StopRequest
from .tracking import track


logger = get_logger(__name__)

NUM_PREVIEW_PICTURES = 4
MAX_STORY_COLUMNS = 4  # besides the base model's
MAX_STORY_ROWS = 6

Row = tuple[str, list[Image.Image | None]]  # a label, and one image per column
Subject = tuple[str, int]  # a prompt and a seed
Result = TypeVar("Result")


class DrawingStopped(Exception):
    """The run was asked to stop."""


class DrawingFailed(DOPSDError):
    """Another process could not draw an image."""


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
    accent_columns: Collection[int] = ()
    accent_rows: Collection[int] = ()

    def draw(self) -> Image.Image:
        rows = [(label, [*map(Cell, images)]) for label, images in self.rows]
        accents = {"accent_columns": self.accent_columns, "accent_rows": self.accent_rows}
        return contact_sheet(self.title, self.columns, rows, note=self.note, **accents)


class Gallery:
    """Draws with base, student and teacher at the deployed number of steps; writes contact sheets and curves.

    Every image is what the stock pipeline draws from the same noise with the saved LoRA. Drawing touches neither the
    weights nor the random generators that training uses.

    Args:
        settings: resolved.
        accelerator: sheets go to its trackers too.
        pipeline, roles, contexts: used to draw images.
        model: what the teacher sees, and what the report says of it.
        save_dtype: of the saved LoRA.
        metrics_log: gets retention.
        stop: if it is set, the rest of a preview or validation is not drawn. A resumed run draws the validation.
        prior: its drawn prompts are shown with the retention prompts.
    """

    def __init__(
        self,
        settings: Settings,
        accelerator: Accelerator,
        *,
        pipeline: FewStepPipeline,
        roles: StudentTeacherLoRA,
        contexts: Contexts,
        model: Model,
        save_dtype: torch.dtype,
        metrics_log: MetricsLog,
        stop: StopRequest,
        prior: PriorPrompts,
    ):
        self.metrics_log, self.stop = metrics_log, stop
        self.settings, self.folder = settings.validation, Path(settings.training.output_dir)
        # Without retention prompts there is nothing to compare the extra ones' drift with.
        self.extra_prompts = prior.drawn if self.settings.retention_prompts else {}
        self.num_rollout_steps = settings.distillation.num_rollout_steps
        self.loss_space = settings.distillation.loss_space
        self.last_step = settings.training.max_train_steps
        self.accelerator, self.pipeline, self.roles, self.contexts = accelerator, pipeline, roles, contexts
        self.calls_match = calls_must_match(settings.performance, accelerator)
        self.is_out_of_step = False  # An error now leaves other processes waiting for this one's part of the weights.
        self.data = contexts.data
        self.teacher_context = model.teacher_context(settings)
        self.report = RunReport(settings, model, self.data)
        self.save_dtype = save_dtype
        self.base_drawings: dict[Subject, Drawing] = {}  # drawn once, the same on all processes
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
        if self.settings.validation_steps > 0 and first_step == 0:
            with self.guarded("The preview", must_succeed=self.settings.preview_only):
                self.draw_preview()
        if first_step > 0 and self.is_due(first_step) and not self.has_retention(first_step):
            self.validate(first_step)
        elif self.settings.validation_steps > 0:
            self.write_report(first_step, "preview only" if self.settings.preview_only else "in progress")
        reset_peak_memory()

    def has_retention(self, step: int) -> bool:
        """Whether the history has the figure that a validation logs last. All processes get the same answer."""
        history = read_history(self.folder)
        return broadcast_object_list([any(row["step"] == step and "retention" in row for row in history)])[0]

    def validate(self, step: int) -> None:
        """Draws validation sheets and logs retention. An error while drawing does not end the run."""
        with self.guarded(f"Validation at step {step}"):
            self.draw_validation(step)
        self.write_report(step, "in progress")
        reset_peak_memory()

    def write_report(self, step: int, state: State) -> None:
        """Writes curves.png and report.html. An error does not end the run."""
        if not self.accelerator.is_main_process:
            return
        with self.guarded("The plot of the curves"):
            self.report.write_curves()
        with self.guarded("The report"):
            self.report.write_page(step, state)

    @contextmanager
    def guarded(self, what: str, *, after: str = "the run continues", must_succeed: bool = False) -> Iterator[None]:
        """Logs an error while drawing. With `must_succeed`, or if other processes wait for this one, it is raised."""
        try:
            yield
        except DrawingStopped:
            logger.info(f"{what} is cut short: the run is asked to stop")
        except Exception as error:
            if must_succeed or self.is_out_of_step:
                raise
            # A full disk needs no traceback.
            details = None if isinstance(error, DOPSDError) else error
            logger.error(f"{what} failed ({one_line(error)}); {after}", exc_info=details)

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
        with self.roles.base_role():
            return self.draw_prompt(prompt, seed)

    def student_drawing(self, prompt: str, seed: int) -> Drawing:
        with self.roles.shipped_role(self.save_dtype):
            return self.draw_prompt(prompt, seed)

    def share(self, jobs: dict[Hashable, Callable[[], Result]], description: str) -> dict[Hashable, Result]:
        """Runs the jobs, shared among the processes. Every process gets all results, in the jobs' order.

        If processes share the transformer's weights, each of them runs all of the jobs.

        Raises:
            DrawingStopped, DrawingFailed, or a job's own error: a process could not run its jobs. All processes raise.
        """
        if self.calls_match:
            return self.run_together(jobs, description)
        accelerator = self.accelerator
        own, failure = {}, None
        bar = tqdm(
            list(jobs)[accelerator.process_index :: accelerator.num_processes],
            desc=description,
            leave=False,
            disable=not accelerator.is_local_main_process,
        )
        try:
            for key in bar:
                if self.stop.is_set:
                    raise DrawingStopped
                own[key] = jobs[key]()
        except Exception as error:
            failure = error
        reports = gather_object([(own, type(failure) is DrawingStopped, failure and one_line(failure))])
        if any(is_stopped for _, is_stopped, _ in reports):
            raise DrawingStopped
        if failure is not None:
            raise failure
        for _, _, problem in reports:
            if problem is not None:
                raise DrawingFailed(problem)
        results = {key: result for part, _, _ in reports for key, result in part.items()}
        return {key: results[key] for key in jobs}

    def run_together(self, jobs: dict[Hashable, Callable[[], Result]], description: str) -> dict[Hashable, Result]:
        """Runs all jobs on every process, in step with the others."""
        results = {}
        is_quiet = not self.accelerator.is_local_main_process
        for key in tqdm(list(jobs), desc=description, leave=False, disable=is_quiet):
            if self.stop.is_set_on_any(self.accelerator):
                raise DrawingStopped
            self.is_out_of_step = True
            results[key] = jobs[key]()
            self.is_out_of_step = False
        return results

    def compare(self, subjects: list[Subject], description: str) -> dict[Subject, tuple[Drawing, Drawing]]:
        """The base's and the student's drawing of each subject, shared among the processes."""
        new = [subject for subject in subjects if subject not in self.base_drawings]
        jobs = {("base", subject): partial(self.base_drawing, *subject) for subject in new}
        jobs |= {("student", subject): partial(self.student_drawing, *subject) for subject in subjects}
        drawn = self.share(jobs, description)
        self.base_drawings |= {subject: drawn["base", subject] for subject in new}
        return {subject: (self.base_drawings[subject], drawn["student", subject]) for subject in subjects}

    def write(self, name: str, step: int, *sheets: Sheet) -> None:
        """Writes contact sheets, below each other, as one PNG and to the trackers."""
        image = stack([sheet.draw() for sheet in sheets], 0)
        path = self.folder / f"{name}.png"
        with naming_file(path):
            save_png(image, path)

        def log_image(tracker: GeneralTracker) -> None:
            if tracker.name in ("tensorboard", "wandb"):
                options = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images({name.partition("-")[0]: np.asarray(image)[None]}, step=step, **options)

        track(self.accelerator, log_image)
        logger.info(f"Wrote {path}")

    # Sheets

    def draw_preview(self) -> None:
        """Before the first step: what the teacher draws. The student cannot learn more than that."""
        jobs = {seed: partial(self.preview_row, seed, sample) for seed, sample in enumerate(self.shown)}
        rows = list(self.share(jobs, "Preview").values())
        if not self.accelerator.is_main_process:
            return
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
        """Three sheets: validation prompts, rollout, and retention prompts, if there are any, with their figure."""
        prompts = list(self.settings.validation_prompt)
        if step == self.last_step and self.settings.final_validation_prompt:
            prompts.append(self.settings.final_validation_prompt)
        asked = [(prompt, seed) for prompt in prompts for seed in range(self.settings.num_validation_images)]
        retained = [(prompt, seed) for seed, prompt in enumerate(self.settings.retention_prompts)]
        # First all that the processes share, so that an error while writing stays on the main process.
        validation = self.compare(asked, "Validation")
        rollouts = self.share({"rollout": self.rollout_images}, "Rollout")["rollout"]
        extra = [(prompt, len(retained) + index) for index, prompt in enumerate(self.extra_prompts.values())]
        retention = self.compare([*retained, *extra], "Retention")
        if self.accelerator.is_main_process:
            self.write_validation(step, prompts, validation)
            self.write_rollout(step, *rollouts)
            if retention:
                self.metrics_log.write(step, self.write_retention(step, retention))

    def write_validation(self, step: int, prompts: list[str], drawn: dict[Subject, tuple[Drawing, Drawing]]) -> None:
        """The validation prompts, with the base model and with the student as it would be saved."""
        seeds = range(self.settings.num_validation_images)
        rows: list[Row] = []
        for prompt in prompts:
            bases, students = ([drawn[prompt, seed][who].image for seed in seeds] for who in (0, 1))
            rows += [(f"base: {prompt}", bases), (f"student: {prompt}", students)]
            self.story[step, prompt, 0] = students[0]
            if step == self.last_step:
                self.keep_for_card(prompt, students[0])
        sheet = Sheet(
            f"After training step {step}, drawn in {self.settings.num_inference_steps} sampling steps",
            [f"seed {seed}" for seed in seeds],
            rows,
            "A column starts from the same noise. Look for your subject, and for edges as sharp as the base's.",
            accent_rows=range(1, len(rows), 2),
        )
        self.write(f"validation-{step}", step, sheet)

    def keep_for_card(self, prompt: str, image: Image.Image) -> None:
        name = f"images/validation_{len(self.card_images)}.png"
        with naming_file(self.folder / name):
            (self.folder / "images").mkdir(exist_ok=True)
            save_png(image, self.folder / name)
        self.card_images.append((prompt, name))

    def rollout_images(self) -> tuple[list[str], list[Image.Image], list[Image.Image]]:
        """Of each state that the student visits: a heading, and the clean images that student and teacher predict."""
        states = self.rollout(self.shown[0])
        return (
            [f"sigma {float(state.sigma):.3f}" for state in states],
            [self.decode(self.pipeline.image_latents(state.student_x0))[0] for state in states],
            [self.decode(self.pipeline.image_latents(state.teacher_x0))[0] for state in states],
        )

    def write_rollout(
        self, step: int, headings: list[str], students: list[Image.Image], teachers: list[Image.Image]
    ) -> None:
        sheet = Sheet(
            f"After training step {step}: the clean picture implied at each visited state, noisiest first",
            headings,
            [("student", students), ("teacher", teachers)],
            f'Caption: "{self.data.caption(self.shown[0])}". The loss is the distance between the two rows'
            + (", divided by sigma." if self.loss_space == "velocity" else "."),
            accent_rows=[0],
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

    def write_retention(self, step: int, drawn: dict[Subject, tuple[Drawing, Drawing]]) -> dict[str, float]:
        """The retention prompts, which should look as before, and then the extra ones. Returns their figures."""
        num_retained = len(self.settings.retention_prompts)
        for prompt, seed in list(drawn)[:num_retained]:
            self.story[step, prompt, seed] = drawn[prompt, seed][1].image
        bases, students = zip(*drawn.values(), strict=True)
        latents = [torch.cat([drawing.latents for drawing in drawings]) for drawings in (bases, students)]
        scale = mean_distance(latents[0][:num_retained])
        moved = (distances(*latents) / scale).tolist()
        figures = {"retention": sum(moved[:num_retained]) / num_retained}
        figures |= {
            f"retention/{name}": value for name, value in zip(self.extra_prompts, moved[num_retained:], strict=True)
        }
        labels = [f"{name.replace('_', ' ')}: {prompt}" for name, prompt in self.extra_prompts.items()]
        not_counted = f" The last {len(labels)} prompts are not part of this figure." if labels else ""
        sheet = Sheet(
            f"After training step {step}: prompts that should look as before, retention {figures['retention']:.3f}",
            [*self.settings.retention_prompts, *labels],
            [("base", [drawing.image for drawing in bases]), ("student", [drawing.image for drawing in students])],
            "A column starts from the same noise. Retention 0: drawn as before. 1: as unlike the base's picture as "
            f"another prompt's picture is.{not_counted}",
            accent_rows=[1],
        )
        self.write(f"retention-{step}", step, sheet)
        return figures

    def draw_story(self) -> None:
        """After the last step: the whole run on one sheet, and its report. An error does not end the run."""
        if self.story:
            with self.guarded("The story", after="the LoRA is saved"):
                self.write("story", self.last_step, *self.story_sheets())
        self.write_report(self.last_step, "finished")

    def story_sheets(self) -> list[Sheet]:
        """Some of the validations and some of the prompts, so that the story fits a screen's width and is not long."""
        prompts, retained = story_subjects(self.settings.validation_prompt, self.settings.retention_prompts)
        steps = evenly_spaced(sorted({step for step, *_ in self.story}), MAX_STORY_COLUMNS)
        columns = ["base", *(f"after step {step}" for step in steps)]

        def row(prompt: str, seed: int) -> Row:
            students = [self.story.get((step, prompt, seed)) for step in steps]
            # A base drawing is missing if the validation that draws it has failed.
            base = self.base_drawings.get((prompt, seed))
            if base is None and not self.calls_match:
                base = self.base_drawing(prompt, seed)
            return prompt, [base and base.image, *students]

        validation = Sheet(
            f"{self.folder.name}: {self.last_step} training steps, drawn in {self.settings.num_inference_steps} "
            "sampling steps",
            columns,
            [row(*subject) for subject in prompts],
            "Validation prompts. Each row starts from the same noise.",
            accent_columns=[len(steps)],
        )
        crops = [self.data.cropped(Crop(sample.example, sample.flip)) for sample in self.shown]
        pictures = [picture for picture in crops if picture is not None]
        training = Sheet("The training pictures", [""] * len(pictures), [("", pictures)], "")
        retention = Sheet(
            "Prompts that have nothing to do with the training",
            columns,
            [row(*subject) for subject in retained],
            "These should stay as the base draws them.",
            accent_columns=[len(steps)],
        )
        return [validation, *([training] if pictures else []), *([retention] if retention.rows else [])]


def story_subjects(prompts: list[str], retention_prompts: list[str]) -> tuple[list[Subject], list[Subject]]:
    """Validation and retention prompts for at most `MAX_STORY_ROWS` rows, half of them for either if both are many."""
    retained = [(prompt, seed) for seed, prompt in enumerate(retention_prompts)]
    retained = evenly_spaced(retained, max(MAX_STORY_ROWS // 2, MAX_STORY_ROWS - len(prompts)))
    return evenly_spaced([(prompt, 0) for prompt in prompts], MAX_STORY_ROWS - len(retained)), retained


def evenly_spaced(items: list[Result], count: int) -> list[Result]:
    """At most `count` of the items, the first and the last among them."""
    if len(items) <= count:
        return items
    return [items[round(place * (len(items) - 1) / (count - 1))] for place in range(count)]
