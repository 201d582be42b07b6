"""What the exam measures on one drawing, and of one row of the preview."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from PIL import Image

from .alignment import Alignment, align
from .closeness import distance_anywhere, distance_in_place, distance_of_features
from .pixels import as_tensor, sharpness, shown_background


IN_PLACE, ANYWHERE, TOWER, FEATURES = "in_place", "anywhere", "tower", "features"
# Name of a measure of closeness -> what it is called in a sentence.
MEASURES = {
    IN_PLACE: "latents in place",
    ANYWHERE: "latents anywhere",
    TOWER: "the vision tower",
    FEATURES: "--exam_model",
}

Images = list[Image.Image]


@dataclass(frozen=True)
class Figures:
    """One drawing beside its picture.

    Attributes:
        distances: name of a measure -> distance from the picture, 0 for the picture itself.
        sharpness: see `pixels.sharpness`.
        alignment: with the picture that the teacher saw.
        background: share of the background of the picture that the teacher saw which the drawing shows in its place;
            None if it cannot be separated from the subject.
    """

    distances: dict[str, float]
    sharpness: float
    alignment: Alignment
    background: float | None


@dataclass(frozen=True)
class Row:
    """One row of the preview.

    Attributes:
        caption: what all of them draw.
        base, teacher: drawn from the same noise.
        picture_sharpness: of the training picture.
        change: distance of the teacher's drawing from the base's, as a share of the base's from the picture; both are
            latents in place.
    """

    caption: str
    base: Figures
    teacher: Figures
    picture_sharpness: float
    change: float


@dataclass(frozen=True)
class Trial:
    """The pictures of one row.

    Attributes:
        base, teacher: drawings.
        picture: the training picture, of the same size.
        seen: the picture that the teacher saw: the same one, or another of any size.
    """

    caption: str
    base: Image.Image
    teacher: Image.Image
    picture: Image.Image
    seen: Image.Image


class Measures:
    """Measures drawings against the pictures of the preview.

    Args:
        latents: (C, h, w) latents of each of some pictures, which may differ in size.
        features: name of a measure -> (N, D) features of N pictures. May be empty.
    """

    def __init__(
        self,
        latents: Callable[[Images], list[torch.Tensor]],
        features: Mapping[str, Callable[[Images], torch.Tensor]],
    ):
        self.encoders = {IN_PLACE: latents} | dict(features)

    def encoded(self, images: Images) -> list[dict[str, torch.Tensor]]:
        """The encodings of each image, on the CPU."""
        columns = {name: [row.cpu() for row in encode(images)] for name, encode in self.encoders.items()}
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]

    def rows(self, trials: list[Trial]) -> list[Row]:
        images = [image for trial in trials for image in (trial.base, trial.teacher, trial.picture)]
        encoded = self.encoded(images)
        rows = []
        for trial, base, teacher, picture in zip(trials, encoded[::3], encoded[1::3], encoded[2::3], strict=True):
            of_base, of_teacher = distances(base, picture), distances(teacher, picture)
            change = distance_in_place(teacher[IN_PLACE], base[IN_PLACE])
            rows.append(
                Row(
                    caption=trial.caption,
                    base=figures(trial.base, trial.seen, of_base),
                    teacher=figures(trial.teacher, trial.seen, of_teacher),
                    picture_sharpness=sharpness(as_tensor(trial.picture)),
                    change=change / max(of_base[IN_PLACE], 1e-6),
                )
            )
        return rows

    def students(self, drawings: Images, trials: list[Trial]) -> list[Figures]:
        """The figures of the student's drawings, one for each row of the preview."""
        encoded = self.encoded([*drawings, *(trial.picture for trial in trials)])
        pairs = zip(encoded[: len(drawings)], encoded[len(drawings) :], strict=True)
        found = [distances(drawing, picture) for drawing, picture in pairs]
        return [figures(drawing, trial.seen, row) for drawing, trial, row in zip(drawings, trials, found, strict=True)]


def distances(drawing: dict[str, torch.Tensor], picture: dict[str, torch.Tensor]) -> dict[str, float]:
    """Name of a measure -> distance, from the encodings of a drawing and of its picture."""
    latents = drawing[IN_PLACE], picture[IN_PLACE]
    found = {IN_PLACE: distance_in_place(*latents), ANYWHERE: distance_anywhere(*latents)}
    others = drawing.keys() - {IN_PLACE}
    return found | {name: distance_of_features(drawing[name], picture[name]) for name in MEASURES if name in others}


def figures(drawing: Image.Image, seen: Image.Image, distances: dict[str, float]) -> Figures:
    first, second = as_tensor(drawing), as_tensor(seen)
    return Figures(
        distances=distances,
        sharpness=sharpness(first),
        alignment=align(first, second),
        background=shown_background(first, second),
    )
