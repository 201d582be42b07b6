"""The content of contact sheets, and the rows of the preview, which show what is to be learned."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from PIL import Image

from .drawing import Drawing
from .exam.figures import Trial
from .sheets import Cell, contact_sheet


Row = tuple[str, list[Image.Image | None]]  # a label, and one image per column


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


@dataclass(frozen=True)
class Lesson:
    """A row of the preview: what base and teacher make of a training picture's caption, from the same noise.

    Attributes:
        label: the caption, or captions.
        cond_images: the pictures to edit.
        base, teacher: their drawings. With --init_lora, the student before training takes the base's place.
        teacher_picture: what the teacher sees, if that is another picture.
        picture: the training picture; None if there is only a caption.
    """

    label: str
    cond_images: list[Image.Image]
    base: Drawing
    teacher: Drawing
    teacher_picture: Image.Image | None
    picture: Image.Image | None

    @property
    def trial(self) -> Trial | None:
        """What the exam compares; nothing without a picture."""
        if self.picture is None:
            return None
        drawn = self.base.image, self.teacher.image
        return Trial(self.label, *drawn, self.picture, seen=self.teacher_picture or self.picture)


def lesson_sheet(
    title: str, note: str, lessons: list[Lesson], *, base: str, teacher: str, students: Sequence[Image.Image] = ()
) -> Sheet:
    """The lessons as rows: pictures to edit, base, teacher, student, the pictures that were to be learned.

    Args:
        base, teacher: headings of their columns.
        students: the student's drawings; without them there is no column for it.
    """
    num_cond_images = max(len(lesson.cond_images) for lesson in lessons)
    headings = [*cond_headings(num_cond_images), base, teacher]
    headings += ["student"] * bool(students)
    headings += ["what the teacher sees"] * any(lesson.teacher_picture for lesson in lessons)
    headings += ["the result" if num_cond_images else "the picture"] * any(lesson.picture for lesson in lessons)
    rows = []
    for index, lesson in enumerate(lessons):
        cells = filled_up(lesson.cond_images, num_cond_images)
        cells += [lesson.base.image, lesson.teacher.image, *students[index : index + 1]]
        cells += [picture for picture in (lesson.teacher_picture, lesson.picture) if picture is not None]
        rows.append((lesson.label, cells))
    return Sheet(title, headings, rows, note, accent_columns=[headings.index("student")] if students else ())


def filled_up(images: list[Image.Image], count: int) -> list[Image.Image | None]:
    """The images, and as many empty cells as are missing."""
    return [*images, *[None] * (count - len(images))]


def cond_headings(count: int) -> list[str]:
    """Of the columns with the pictures to edit."""
    return ["to edit"] * count if count < 2 else [f"to edit, {number}" for number in range(1, count + 1)]
