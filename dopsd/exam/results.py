"""The exam's results: averages over the rows of the preview."""

import math
from dataclasses import dataclass
from statistics import mean, stdev

from .alignment import Alignment
from .figures import IN_PLACE, Figures, Row
from .thresholds import (
    BACKGROUND_GIVEN,
    COPY_SHIFT,
    LEAST_DEVIATION,
    MOST_ROWS,
    SHIFTED,
    SINGLE_DEVIATION,
    STANDARD_ERRORS,
    ZOOMED,
)


@dataclass(frozen=True)
class Lead:
    """Which part of the base's distance from the picture the teacher saves, over some rows.

    Attributes:
        value: 1: it draws the picture. 0: it is as far from it as the base. Negative: further.
        error: standard error of that mean.
    """

    value: float
    error: float

    @property
    def at_most(self) -> float:
        """What it hardly exceeds, if other rows had been drawn."""
        return self.value + STANDARD_ERRORS * self.error


@dataclass(frozen=True)
class Motion:
    """Zoom and shift that most rows share; see `Alignment`."""

    scale: float
    right: float
    down: float


@dataclass(frozen=True)
class Exam:
    """A teacher's exam.

    Attributes:
        rows: at least one.
        is_editor: whether base and teacher also see the pictures to edit, so that the teacher should draw the whole
            picture.
        saw_other: whether the teacher saw another picture of the subject.
        saw_picture: whether it saw any.
        saw_by_tower: whether it saw them through a vision tower only, which tells what they show, not each detail.
        from_lora: whether "base" is the student before training, which began as the LoRA of --init_lora.
        num_inference_steps: of all drawings.
        exam_model: the model of the measure "features", if there is one.
    """

    rows: tuple[Row, ...]
    is_editor: bool = False
    saw_other: bool = False
    saw_picture: bool = True
    saw_by_tower: bool = False
    from_lora: bool = False
    num_inference_steps: int | None = None
    exam_model: str | None = None

    @property
    def reference(self) -> str:
        """What the teacher is compared with, in words."""
        return "the student before training" if self.from_lora else "the base"

    @property
    def measures(self) -> list[str]:
        """Names of the measures of closeness."""
        return list(self.rows[0].base.distances)

    @property
    def leads(self) -> dict[str, Lead]:
        return {name: lead(self.distances("base", name), self.distances("teacher", name)) for name in self.measures}

    @property
    def deciding_leads(self) -> dict[str, Lead]:
        """Those that tell whether the teacher has the subject. Latents in place do not: it may draw it elsewhere."""
        return {name: value for name, value in self.leads.items() if name != IN_PLACE or self.is_editor}

    def distances(self, who: str, measure: str) -> list[float]:
        """Of the base's or the teacher's drawings."""
        return [getattr(row, who).distances[measure] for row in self.rows]

    @property
    def change(self) -> float:
        """Mean distance of the teacher's drawings from the base's, over the base's distance from the pictures."""
        return mean(row.change for row in self.rows)

    @property
    def sharpness_kept(self) -> float:
        """The teacher's over that of the base or of the picture, whichever is softer."""
        return self.sharpness("teacher")

    def sharpness(self, who: str) -> float:
        """The base's or the teacher's over that of the base or of the picture, whichever is softer."""
        softer = mean(min(row.base.sharpness, row.picture_sharpness) for row in self.rows)
        return ratio(mean(one.sharpness for one in self.figures(who)), softer)

    def motion(self, who: str) -> Motion | None:
        """Of the base's or the teacher's drawings; see `average_motion`."""
        return average_motion(self.figures(who))

    def figures(self, who: str) -> list[Figures]:
        return [getattr(row, who) for row in self.rows]

    def shares_shift(self, who: str) -> bool:
        """Whether most drawings have nearly the shift of `motion`: of others, the average means nothing."""
        motion = self.motion(who)
        found = [one.alignment for one in self.figures(who) if one.alignment.is_found]
        return motion is not None and sum(apart(one, motion) < SHIFTED for one in found) >= self.most_rows

    @property
    def most_rows(self) -> int:
        return math.ceil(MOST_ROWS * len(self.rows))

    @property
    def kept_background(self) -> float | None:
        """Share of the background that the teacher shows in its place; None if it cannot be separated anywhere."""
        known = [one.background for one in self.figures("teacher") if one.background is not None]
        return mean(known) if known else None

    @property
    def copied_background(self) -> float | None:
        """Share of the background that the base does not show in its place, and the teacher does.

        What the caption gives, the base draws too. Negative: the teacher shows less of it than the base. None: it
        cannot be separated from the subject in any picture, or the base shows all of it.
        """
        known = [row for row in self.rows if row.base.background is not None]
        if not known:
            return None
        base, teacher = (mean(getattr(row, who).background for row in known) for who in ("base", "teacher"))
        return None if base > BACKGROUND_GIVEN else (teacher - base) / (1 - base)


def average_motion(drawings: list[Figures]) -> Motion | None:
    """The average of the drawings that align with their pictures; None if too few of them do."""
    found = [one.alignment for one in drawings if one.alignment.is_found]
    if len(found) < MOST_ROWS * len(drawings):
        return None
    scale = math.exp(mean(math.log(one.scale) for one in found))
    return Motion(scale, mean(one.right for one in found), mean(one.down for one in found))


def apart(first: Alignment | Motion, second: Motion) -> float:
    """The larger part of the difference of two shifts."""
    return max(abs(first.right - second.right), abs(first.down - second.down))


def lead(base: list[float], other: list[float]) -> Lead:
    """The lead of drawings with distances `other` over the base's, row by row."""
    scale = max(mean(base), 1e-6)
    saved = [(first - second) / scale for first, second in zip(base, other, strict=True)]
    deviation = max(stdev(saved), LEAST_DEVIATION) if len(saved) > 1 else SINGLE_DEVIATION
    return Lead(mean(saved), deviation / math.sqrt(len(saved)))


def is_copy(figures: Figures) -> bool:
    """Whether a drawing shows the picture as it is, neither zoomed nor moved."""
    found = figures.alignment
    is_there = max(abs(found.right), abs(found.down)) <= COPY_SHIFT
    return found.is_found and is_there and 1 / ZOOMED < found.scale < ZOOMED


def ratio(value: float, reference: float) -> float:
    return value / reference if reference > 1e-6 else 1.0
