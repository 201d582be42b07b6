"""The exam of a run: taken with the preview, read again when the run is resumed, repeated for the student."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list

from ..contexts import Contexts
from ..output import naming_file
from ..picture_model import PictureModel
from ..settings import Settings
from .figures import FEATURES, TOWER, Figures, Images, Measures, Row, Trial
from .results import Exam
from .store import EXAM_FILE, read_exam, write_exam
from .student import in_words, student_figures
from .table import as_text
from .verdict import findings, stop_line


logger = get_logger(__name__)


def open_exam_model(settings: Settings) -> PictureModel | None:
    """`--exam_model` without its weights, if the run draws anything. Raises `InputError` if it cannot be used."""
    name = settings.validation.exam_model
    if name is None or settings.validation.validation_steps == 0 or settings.training.encode_only:
        return None
    return PictureModel(name, settings.model.cache_dir)


class Examiner:
    """Examines the teacher of a run, and measures its student. Only the main process measures.

    Args:
        settings: resolved.
        contexts: of the run; without a cache, its vision tower is loaded and looks at the pictures, too.
        encode: (C, h, w) latents of each of some pictures.
        device: the accelerator.

    Attributes:
        exam: on the main process; None before it is taken, and if there is nothing to compare.
        student: the student's figures at the last validation; empty if it was not examined.
    """

    def __init__(
        self,
        settings: Settings,
        contexts: Contexts,
        encode: Callable[[Images], list[torch.Tensor]],
        device: torch.device,
    ):
        self.settings, self.folder = settings, Path(settings.training.output_dir)
        self.is_editor = contexts.data.is_editing
        self.saw_picture = contexts.conditioning.teacher_sees_picture
        features: dict[str, Callable[[Images], torch.Tensor]] = {}
        towers = [encoder.picture_features for encoder in contexts.conditioning.teacher if encoder.has_tower]
        self.saw_by_tower = bool(towers)
        if towers and settings.training.no_context_cache:
            features[TOWER] = lambda images: torch.stack([towers[0](image) for image in images])
        if (model := open_exam_model(settings)) is not None:
            features[FEATURES] = partial(model.features, device=device)
        self.measures = Measures(encode, features)
        self.exam: Exam | None = None
        self.student: dict[str, float] = {}

    @property
    def verdict(self) -> str:
        """A line for the preview's sheet."""
        return "" if self.exam is None else f"Verdict: {findings(self.exam)[0]}."

    @property
    def standing(self) -> str:
        """A line for the sheet with the student's drawings."""
        return in_words(self.student, from_lora=self.exam.from_lora) if self.student else ""

    def start(self) -> None:
        """Removes the exam.json of an earlier run. Raises `OutputError` if that is not possible."""
        with naming_file(self.folder / EXAM_FILE):
            (self.folder / EXAM_FILE).unlink(missing_ok=True)

    def examine(self, trials: list[Trial | None]) -> None:
        """Takes the exam of the rows with a picture, if there is any; prints it and writes exam.json."""
        trials = [trial for trial in trials if trial is not None]
        if not trials:
            return
        exam = Exam(
            tuple(self.measures.rows(trials)),
            is_editor=self.is_editor,
            saw_other=any(trial.seen is not trial.picture for trial in trials),
            saw_picture=self.saw_picture,
            saw_by_tower=self.saw_by_tower,
            from_lora=self.settings.lora.init_lora is not None,
            num_inference_steps=self.settings.validation.num_inference_steps,
            exam_model=self.settings.validation.exam_model,
        )
        logger.info(f"The teacher's exam:\n{as_text(exam)}")
        write_exam(exam, self.folder)
        self.exam = exam

    def resume(self) -> None:
        """Reads the exam that was taken before the first step."""
        exam = read_exam(self.folder)
        if exam is None:
            return
        own = self.settings.validation
        if exam.num_inference_steps != own.num_inference_steps:
            logger.warning(
                f"--num_inference_steps {own.num_inference_steps}: the teacher's exam was drawn in "
                f"{exam.num_inference_steps}, so the student's progress is not measured"
            )
            return
        if exam.exam_model != own.exam_model:
            logger.warning(
                f"--exam_model {own.exam_model or 'is missing'}: the teacher's exam was taken with "
                f"{exam.exam_model or 'none'}, so features are not compared"
            )
            exam = without_features(exam)
        self.exam = exam

    def examine_student(self, images: Images, trials: list[Trial | None]) -> None:
        """Measures the student's drawings, if there was an exam of as many rows."""
        self.student = {}
        pairs = [(image, trial) for image, trial in zip(images, trials, strict=True) if trial is not None]
        if self.exam is not None and len(pairs) == len(self.exam.rows):
            images, trials = map(list, zip(*pairs, strict=True))
            self.student = student_figures(self.exam, self.measures.students(images, trials))
            logger.info(f"The student's exam: {self.standing}")

    def refusal(self) -> str | None:
        """Why the run should not start; None if it may. All processes get the same answer."""
        if self.settings.validation.ignore_exam or self.settings.validation.preview_only:
            return None
        teacher = f"--teacher_context {self.settings.teacher.teacher_context}"
        return broadcast_object_list([None if self.exam is None else stop_line(self.exam, teacher)])[0]


def without_features(exam: Exam) -> Exam:
    """An exam without the features of a model that this run does not have."""

    def other(figures: Figures) -> Figures:
        distances = {name: value for name, value in figures.distances.items() if name != FEATURES}
        return replace(figures, distances=distances)

    rows: list[Row] = [replace(row, base=other(row.base), teacher=other(row.teacher)) for row in exam.rows]
    return replace(exam, rows=tuple(rows), exam_model=None)
