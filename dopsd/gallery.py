"""What a run draws and when: preview, validation, rollout, retention, and the story of the whole run."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.tracking import GeneralTracker
from accelerate.utils import broadcast_object_list
from PIL import Image

from .contexts import Contexts
from .data.order import Sample
from .data.requests import Request
from .drawing import Drawing, DrawingStopped, Result, Studio, Subject
from .errors import DOPSDError, InputError, one_line
from .evaluation.comparison import Comparison
from .exam.examiner import Examiner
from .exam.student import PROGRESS
from .history import MetricsLog, read_history
from .html_report import RunReport, State
from .lessons import Lesson, Row, Sheet, cond_headings, filled_up, lesson_sheet
from .memory import reset_peak_memory
from .model import FewStepPipeline, Model
from .model_card import CardImage
from .output import naming_file
from .prior import PriorPrompts
from .retention import distances, mean_distance
from .roles import Roles
from .rollout import RolloutStep, rollout
from .settings import Settings
from .sheets import beside, save_png, stack
from .stopping import StopRequest
from .tracking import track


logger = get_logger(__name__)

NUM_PREVIEW_PICTURES = 4
MAX_STORY_COLUMNS = 4  # besides the base model's
MAX_STORY_ROWS = 6
CARD_GAP = 8  # pixels


class Gallery(Studio):
    """Writes contact sheets of what base, student and teacher draw, and curves.

    Args:
        settings: resolved.
        accelerator: sheets go to its trackers too.
        pipeline, roles, contexts, save_dtype, stop: see `Studio`. A resumed run draws a validation that was stopped.
        model: what the teacher sees, and what the report says of it.
        metrics_log: gets retention.
        prior: its drawn prompts are shown with the retention prompts.
    """

    def __init__(
        self,
        settings: Settings,
        accelerator: Accelerator,
        *,
        pipeline: FewStepPipeline,
        roles: Roles,
        contexts: Contexts,
        model: Model,
        save_dtype: torch.dtype,
        metrics_log: MetricsLog,
        stop: StopRequest,
        prior: PriorPrompts,
    ):
        drawn_with = {"pipeline": pipeline, "roles": roles, "contexts": contexts}
        super().__init__(settings, accelerator, **drawn_with, save_dtype=save_dtype, stop=stop)
        self.metrics_log, self.folder = metrics_log, Path(settings.training.output_dir)
        # Without retention prompts there is nothing to compare the extra ones' drift with.
        self.extra_prompts = prior.drawn if self.settings.retention_prompts else {}
        self.num_rollout_steps = settings.distillation.num_rollout_steps
        self.loss_space = settings.distillation.loss_space
        self.last_step = settings.training.max_train_steps
        self.data = contexts.data
        self.teacher_context = model.teacher_context(settings)
        self.report = RunReport(settings, model, self.data)
        self.examiner = Examiner(settings, contexts, self.encode, accelerator.device)
        # (step, subject) -> the student's image, for validation prompts at seed 0 and for retention prompts
        self.story: dict[tuple[int, Subject], Image.Image] = {}
        self.card_images: list[CardImage] = []
        self.shown = self.data.shown(NUM_PREVIEW_PICTURES)
        self.lessons: list[Lesson] = []  # of `shown`, on all processes
        self.from_lora = settings.lora.init_lora is not None
        self.lessons_step = 0  # after which they were drawn

    def request(self, prompt: str) -> Request:
        """A picture of the validation's size, from a prompt alone."""
        return Request(prompt, (), (self.settings.validation_height, self.settings.validation_width))

    def validation_requests(self) -> list[Request]:
        return self.data.editing_requests or [self.request(prompt) for prompt in self.settings.validation_prompt]

    def final_request(self) -> Request:
        """The additional prompt of the last validation; an editor edits what its first prompt edits."""
        prompt = self.settings.final_validation_prompt
        return replace(self.validation_requests()[0], prompt=prompt)

    def extra_request(self, name: str, prompt: str) -> Request:
        """A prompt that is drawn with the retention prompts. An editor's are edits, except for the held-out one."""
        request = self.request(prompt)
        if self.data.is_editing and name != "held_out":
            request = replace(request, cond_images=self.validation_requests()[0].cond_images)
        return request

    def retention_subjects(self) -> list[Subject]:
        return [Subject(self.request(prompt), seed) for seed, prompt in enumerate(self.settings.retention_prompts)]

    def postfix(self, metrics: dict[str, float]) -> dict[str, str]:
        """What the progress bar shows of a step, and of the last validation."""
        standing = self.examiner.student.get(PROGRESS)
        shown = {name: f"{metrics[name]:.3g}" for name in ("loss", "lr")}
        return shown if standing is None else shown | {PROGRESS: f"{round(standing)}%"}

    # When to draw

    def is_due(self, step: int) -> bool:
        """Whether to validate after `step` steps."""
        every = self.settings.validation_steps
        return every > 0 and (step % every == 0 or step == self.last_step)

    def draw_before_training(self, first_step: int) -> None:
        """Draws the preview of a new run; for a resumed run, the validation that its interruption cut short.

        Raises:
            InputError: the teacher is no better than its student. All processes raise it.
        """
        if first_step == 0 and self.accelerator.is_main_process:
            with self.guarded("Removing an earlier exam"):
                self.examiner.start()
        if self.settings.validation_steps > 0:
            state: State = "preview only" if self.settings.preview_only else "in progress"
            if first_step == 0:
                with self.guarded("The preview", must_succeed=self.settings.preview_only):
                    self.draw_preview()
                if (refusal := self.examiner.refusal()) is not None:
                    self.report.refusal = refusal
                    self.write_report(0, "stopped")
                    raise InputError(refusal)
            elif self.accelerator.is_main_process:
                self.examiner.resume()
            if first_step > 0 and self.is_due(first_step) and not self.has_retention(first_step):
                self.validate(first_step)
            else:
                self.write_report(first_step, state)
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
            self.report.exam = self.examiner.exam
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
        self.draw_lessons(0)
        if not self.accelerator.is_main_process:
            return
        with self.guarded("The exam"):
            self.examiner.examine([lesson.trial for lesson in self.lessons])
        remedy = (
            "--teacher_context, --teacher_prompt_suffix, --resolution or the pictures"
            if self.contexts.conditioning.teacher_sees_picture
            else "the teacher's captions"
        )
        start = "its own" if self.shows_student_before else "the base's"
        sheet = self.lesson_sheet(
            f"Before training, drawn in {self.settings.num_inference_steps} sampling steps",
            f"The student is pulled from {start} column towards the teacher's. If the teacher's does not show "
            f"what you want, training cannot teach it: change {remedy} before you spend hours.\n"
            f"{self.examiner.verdict}",
        )
        self.write("preview", 0, sheet)

    def draw_lessons(self, step: int) -> None:
        """Draws the rows of the preview after `step` steps. Later validations show them again."""
        self.lessons_step = step
        jobs = {seed: partial(self.lesson, seed, sample) for seed, sample in enumerate(self.shown)}
        self.lessons = list(self.share(jobs, "Preview").values())

    @property
    def shows_student_before(self) -> bool:
        """Whether the student's drawings before training stand for the base's: it began as a LoRA.

        A resumed run no longer has that student, and draws the base.
        """
        return self.from_lora and self.lessons_step == 0

    @property
    def lesson_headings(self) -> tuple[str, str]:
        """Of the columns of base and teacher; the teacher of a resumed run is no longer that of the preview."""
        now = "" if self.lessons_step == 0 else " now"
        base = "student before" if self.shows_student_before else "base"
        return base, f"teacher{now}: {self.teacher_context.description}"

    def lesson(self, seed: int, sample: Sample) -> Lesson:
        caption, teacher_caption = self.data.caption(sample), self.data.picture(sample).teacher_caption
        crop, teacher_crop = self.data.crop(sample), self.data.teacher_crop(sample)
        return Lesson(
            label=caption if teacher_caption is None else f"{caption} (teacher: {teacher_caption})",
            cond_images=[self.data.pixels(cond_crop) for cond_crop in self.data.cond_crops(sample)],
            base=(self.student_drawing if self.shows_student_before else self.base_drawing)(
                self.data.request(sample), seed
            ),
            teacher=self.teacher_drawing(sample, seed),
            teacher_picture=None if teacher_crop == crop else self.data.pixels(teacher_crop),
            picture=self.data.pixels(crop),
        )

    def lesson_sheet(self, title: str, note: str, students: Sequence[Image.Image] = ()) -> Sheet:
        base, teacher = self.lesson_headings
        return lesson_sheet(title, note, self.lessons, base=base, teacher=teacher, students=students)

    def draw_validation(self, step: int) -> None:
        """Sheets of the validation prompts, the preview's rows, the rollout, and the retention prompts, if any."""
        requests = [*self.validation_requests()]
        if step == self.last_step and self.settings.final_validation_prompt:
            requests.append(self.final_request())
        asked = [Subject(request, seed) for request in requests for seed in range(self.settings.num_validation_images)]
        retained = self.retention_subjects()
        # First all that the processes share, so that an error while writing stays on the main process.
        validation = self.compare(asked, "Validation")
        if not self.lessons:  # of a resumed run
            self.draw_lessons(step)
        learned = {
            seed: partial(self.student_drawing, self.data.request(sample), seed)
            for seed, sample in enumerate(self.shown)
        }
        students = list(self.share(learned, "Lessons").values())
        rollouts = self.share({"rollout": self.rollout_images}, "Rollout")["rollout"]
        extra = [
            Subject(self.extra_request(name, prompt), len(retained) + index)
            for index, (name, prompt) in enumerate(self.extra_prompts.items())
        ]
        retention = self.compare([*retained, *extra], "Retention")
        if self.accelerator.is_main_process:
            self.write_validation(step, requests, validation)
            figures = self.write_lessons(step, students)
            self.write_rollout(step, *rollouts)
            if retention:
                figures |= self.write_retention(step, retention)
            if figures:
                self.metrics_log.write(step, figures)

    def write_lessons(self, step: int, students: list[Drawing]) -> dict[str, float]:
        """The preview's rows again, with the student as it would be saved. Returns how far it has come."""
        images = [drawing.image for drawing in students]
        with self.guarded("The student's exam"):
            self.examiner.examine_student(images, [lesson.trial for lesson in self.lessons])
        began = "the LoRA of --init_lora" if self.from_lora else "the base"
        sheet = self.lesson_sheet(
            f"After training step {step}: what was to be learned",
            f"A row starts from the same noise. The student began as {began} and is pulled towards the teacher.\n"
            f"{self.examiner.standing}",
            images,
        )
        self.write(f"lessons-{step}", step, sheet)
        return {**self.examiner.student}

    def write_validation(
        self, step: int, requests: list[Request], drawn: dict[Subject, tuple[Drawing, Drawing]]
    ) -> None:
        """The validation prompts, with the base model and with the student as it would be saved."""
        seeds = range(self.settings.num_validation_images)
        num_cond_images = max(len(request.cond_images) for request in requests)
        rows: list[Row] = []
        for request in requests:
            bases, students = ([drawn[Subject(request, seed)][who].image for seed in seeds] for who in (0, 1))
            cond_cells = self.cond_cells(request, num_cond_images)
            rows.append((f"base: {request.prompt}", [*cond_cells, *bases]))
            rows.append((f"student: {request.prompt}", [*[None] * num_cond_images, *students]))
            self.story[step, Subject(request, 0)] = students[0]
            if step == self.last_step:
                self.keep_for_card(request.prompt, cond_cells, students[0])
        sheet = Sheet(
            f"After training step {step}, drawn in {self.settings.num_inference_steps} sampling steps",
            [*cond_headings(num_cond_images), *(f"seed {seed}" for seed in seeds)],
            rows,
            "A column starts from the same noise. Look for your "
            f"{'edit' if num_cond_images else 'subject'}, and for edges as sharp as the base's.",
            accent_rows=range(1, len(rows), 2),
        )
        self.write(f"validation-{step}", step, sheet)

    def cond_cells(self, request: Request, count: int) -> list[Image.Image | None]:
        """The pictures to edit, filled up with empty cells."""
        return filled_up([self.data.pixels(crop) for crop in request.cond_images], count)

    def keep_for_card(self, prompt: str, cond_images: list[Image.Image | None], image: Image.Image) -> None:
        """Saves what the student has drawn, beside the pictures that it has edited."""
        shown = [one for one in cond_images if one is not None]
        equally_high = [one.resize((round(one.width * image.height / one.height), image.height)) for one in shown]
        name = f"images/validation_{len(self.card_images)}.png"
        with naming_file(self.folder / name):
            (self.folder / "images").mkdir(exist_ok=True)
            save_png(beside([*equally_high, image], CARD_GAP), self.folder / name)
        self.card_images.append(CardImage(prompt, name, len(shown)))

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
        for subject in list(drawn)[:num_retained]:
            self.story[step, subject] = drawn[subject][1].image
        bases, students = zip(*drawn.values(), strict=True)
        latents = [torch.cat([drawing.latents for drawing in drawings]) for drawings in (bases, students)]
        scale = mean_distance(latents[0][:num_retained])
        moved = (distances(*latents) / scale).tolist()
        figures = {"retention": sum(moved[:num_retained]) / num_retained}
        figures |= {
            f"retention/{name}": value for name, value in zip(self.extra_prompts, moved[num_retained:], strict=True)
        }
        labels = [f"{name.replace('_', ' ')}: {prompt}" for name, prompt in self.extra_prompts.items()]
        last = "The last prompt is" if len(labels) == 1 else f"The last {len(labels)} prompts are"
        not_counted = f" {last} not part of this figure." if labels else ""
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
            with self.guarded("The story", after="the weights are saved"):
                self.write("story", self.last_step, *self.story_sheets())
        self.write_report(self.last_step, "finished")

    def show_comparison(self, comparison: Comparison) -> None:
        """Adds what `--evaluate` has found to the report."""
        self.report.comparison = comparison
        self.write_report(self.last_step, "finished")

    def story_sheets(self) -> list[Sheet]:
        """Some of the validations and some of the prompts, so that the story fits a screen's width and is not long."""
        asked, retained = story_subjects(
            [Subject(request, 0) for request in self.validation_requests()], self.retention_subjects()
        )
        steps = evenly_spaced(sorted({step for step, _ in self.story}), MAX_STORY_COLUMNS)
        columns = ["base", *(f"after step {step}" for step in steps)]

        def row(subject: Subject) -> Row:
            students = [self.story.get((step, subject)) for step in steps]
            # A base drawing is missing if the validation that draws it has failed.
            base = self.base_drawings.get(subject)
            if base is None and not self.calls_match:
                base = self.base_drawing(*subject)
            return subject.request.prompt, [base and base.image, *students]

        num_cond_images = max(len(subject.request.cond_images) for subject in asked)
        asked_rows = [
            (label, [*self.cond_cells(subject.request, num_cond_images), *images])
            for subject, (label, images) in zip(asked, map(row, asked), strict=True)
        ]
        validation = Sheet(
            f"{self.folder.name}: {self.last_step} training steps, drawn in {self.settings.num_inference_steps} "
            "sampling steps",
            [*cond_headings(num_cond_images), *columns],
            asked_rows,
            "Validation prompts. Each row starts from the same noise.",
            accent_columns=[num_cond_images + len(steps)],
        )
        crops = [self.data.pixels(self.data.crop(sample)) for sample in self.shown]
        pictures = [picture for picture in crops if picture is not None]
        training = Sheet(
            "The results of the training pairs" if self.data.is_editing else "The training pictures",
            [""] * len(pictures),
            [("", pictures)],
            "",
        )
        retention = Sheet(
            "Prompts that have nothing to do with the training",
            columns,
            [row(subject) for subject in retained],
            "These should stay as the base draws them.",
            accent_columns=[len(steps)],
        )
        return [validation, *([training] if pictures else []), *([retention] if retention.rows else [])]


def story_subjects(asked: list[Subject], retained: list[Subject]) -> tuple[list[Subject], list[Subject]]:
    """Validation and retention prompts for at most `MAX_STORY_ROWS` rows, half of them for either if both are many."""
    retained = evenly_spaced(retained, max(MAX_STORY_ROWS // 2, MAX_STORY_ROWS - len(asked)))
    return evenly_spaced(asked, MAX_STORY_ROWS - len(retained)), retained


def evenly_spaced(items: list[Result], count: int) -> list[Result]:
    """At most `count` of the items, the first and the last among them."""
    if len(items) <= count:
        return items
    return [items[round(place * (len(items) - 1) / (count - 1))] for place in range(count)]
