"""Measures what was drawn: features of every picture, then a figure for each contender and column."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps
from tqdm.auto import tqdm

from ..exam.pixels import as_tensor, fine_detail, sharpness
from ..model_card import public_name
from . import figures
from .columns import (
    CLIP,
    CLOSENESS,
    COPIES,
    DETAIL,
    DETAIL_UNRELATED,
    DINO,
    DIVERSITY,
    FOLLOWING,
    FOLLOWING_UNRELATED,
    GROUPS,
    JUDGE,
    KEPT,
    LEAKAGE,
    LIKENESS,
    MASKED,
    RETENTION,
    SCORE,
    SHARPNESS,
    SHARPNESS_UNRELATED,
    column,
)
from .comparison import Column, Comparison, Contender, Drawn, Figure, Prompt, Role
from .features import BATCH_SIZE, FeatureModels, cutout, is_separable
from .judge import Judge


FEW_PICTURES = 4
NEARLY_THE_SAME = 0.95  # mean cosine of the training pictures with the nearest other one
THUMBNAIL_SIDE = 16  # pixels, at which drawings and training pictures are compared pixel by pixel

Source = Callable[[], Image.Image]  # opens a picture


@dataclass(frozen=True)
class Features:
    """The features of one model.

    Attributes:
        training: (N, D).
        to_edit: (M, D), of the pictures to edit.
        drawn: file -> (D,); masked, NaN for a picture that is not to show the subject, or whose subject cannot be
            separated.
    """

    training: torch.Tensor
    to_edit: torch.Tensor
    drawn: dict[Path, torch.Tensor]


def measure(
    prompts: list[Prompt],
    drawn: Drawn,
    training: list[Image.Image],
    models: FeatureModels,
    *,
    device: torch.device,
    settings: dict[str, Any],
    subject: str | None = None,
    to_edit: Sequence[Image.Image] = (),
    judge: Judge | None = None,
) -> Comparison:
    """Measures all contenders. The base must be among them, and every contender has as many seeds for each prompt.

    Args:
        prompts: that were drawn, in the order of the page.
        training: at least one picture.
        device: on which the models are loaded, one after the other.
        settings: of the comparison, for its page.
        subject: what the mask model looks for, such as "dog". Needed with `models.mask`.
        to_edit: the pictures to edit, for an editor.
        judge: asked about the drawings of the subject.

    Raises:
        InputError: a model's weights cannot be loaded, or its features are not finite.
    """
    measured = Measurement(prompts, drawn, training, models, device, to_edit)
    measured.measure_features(subject)
    measured.measure_pixels()
    measured.judge(judge)
    return measured.comparison(settings)


class Measurement:
    """See `measure`."""

    def __init__(
        self,
        prompts: list[Prompt],
        drawn: Drawn,
        training: list[Image.Image],
        models: FeatureModels,
        device: torch.device,
        to_edit: Sequence[Image.Image],
    ):
        self.prompts, self.drawn, self.training, self.to_edit = prompts, drawn, training, list(to_edit)
        self.models, self.device = models, device
        files = (path for by_prompt in drawn.values() for paths in by_prompt.values() for path in paths)
        self.files = list(dict.fromkeys(files))
        self.features: dict[tuple[str, bool], Features] = {}  # (CLIP or DINO, whether masked)
        self.texts: dict[Prompt, torch.Tensor] = {}
        self.sharpness: dict[Path, float] = {}
        self.detail: dict[Path, float] = {}
        self.thumbnails: dict[Path, torch.Tensor] = {}
        self.training_thumbnails = torch.stack([thumbnail(image) for image in training])
        self.scores: dict[Path, float] = {}
        self.judge_name: str | None = None
        self.notes: list[str] = []

    # Pictures

    def measure_features(self, subject: str | None) -> None:
        sources: list[Source] = [lambda image=image: image for image in [*self.training, *self.to_edit]]
        sources += [lambda path=path: opened(path) for path in self.files]
        masked = [] if self.models.mask is None else self.with_subject()
        with tqdm(total=2 * len(sources) + 3 * len(masked), desc="Measuring", unit="picture") as bar:

            def reading(chosen: Iterable[Source]) -> Iterator[Image.Image]:
                for source in chosen:
                    yield source()
                    bar.update()

            for kind, model in ((CLIP, self.models.clip), (DINO, self.models.dino)):
                self.features[kind, False] = self.divided(model.features(reading(sources), self.device, BATCH_SIZE))
            plain = list(dict.fromkeys(prompt.plain for prompt in self.prompts))
            texts = dict(zip(plain, self.models.clip.text_features(plain, self.device), strict=True))
            self.texts = {prompt: texts[prompt.plain] for prompt in self.prompts}
            if masked:
                self.measure_masked(sources, masked, subject, reading)
        if long := self.models.clip.too_long(plain):
            self.notes.append(
                f"Prompts that are longer than the text limit of {public_name(self.models.clip.name_or_path)}, which "
                f"reads only their beginning: {len(long)}."
            )

    def with_subject(self) -> list[int]:
        """Indices of what is to show the subject, among training pictures, pictures to edit and drawings."""
        asked = {*self.files_of("concept")}
        first = len(self.training) + len(self.to_edit)
        return [
            *range(len(self.training)),
            *(first + number for number, path in enumerate(self.files) if path in asked),
        ]

    def measure_masked(
        self,
        sources: list[Source],
        masked: list[int],
        subject: str | None,
        reading: Callable[[Iterable[Source]], Iterator[Image.Image]],
    ) -> None:
        """Features of the subjects alone, unless no training picture's or no drawing's can be separated.

        Args:
            masked: see `with_subject`.
        """
        found = self.models.mask.certainties(reading(sources[index] for index in masked), subject, self.device)
        certainties = {
            index: certainty for index, certainty in zip(masked, found, strict=True) if is_separable(certainty)
        }
        num_training = sum(index < len(self.training) for index in certainties)
        num_drawn = len(certainties) - num_training
        self.notes.append(
            f"The subject was separated in {num_training} of {len(self.training)} training pictures and {num_drawn} "
            f"of {len(masked) - len(self.training)} drawings of it; masked figures are of these."
        )
        if not num_training or not num_drawn:
            return
        cut = [
            lambda index=index, certainty=certainty: cutout(sources[index](), certainty)
            for index, certainty in certainties.items()
        ]
        for kind, model in ((CLIP, self.models.clip), (DINO, self.models.dino)):
            rows = model.features(reading(cut), self.device, BATCH_SIZE)
            every = torch.full((len(sources), rows.shape[1]), torch.nan)
            every[list(certainties)] = rows
            features = self.divided(every)
            known = features.training[~features.training.isnan().any(1)]
            self.features[kind, True] = Features(known, features.to_edit, features.drawn)

    def divided(self, features: torch.Tensor) -> Features:
        """The rows of training pictures, pictures to edit and drawings, which are measured together."""
        parts = [len(self.training), len(self.to_edit), len(self.files)]
        training, to_edit, drawn = features.split(parts)
        return Features(training, to_edit, dict(zip(self.files, drawn, strict=True)))

    def measure_pixels(self) -> None:
        """Sharpness, fine detail and thumbnails of the drawings of the subject and of unrelated prompts."""
        files = self.files_of("concept") + self.files_of("unrelated")
        for path in tqdm(list(dict.fromkeys(files)), desc="Measuring pixels", unit="picture"):
            image = opened(path)
            pixels = as_tensor(image)
            self.sharpness[path], self.detail[path] = sharpness(pixels), fine_detail(pixels)
            self.thumbnails[path] = thumbnail(image)

    def judge(self, judge: Judge | None) -> None:
        """Asks about the drawings of the subject, each beside a training picture: the same one for all contenders."""
        if judge is None:
            return
        pairs: dict[Path, Image.Image] = {}
        for by_prompt in self.drawn.values():
            for number, prompt in enumerate(self.of_role("concept", by_prompt)):
                for seed, path in enumerate(by_prompt[prompt]):
                    pairs[path] = self.training[(number + seed) % len(self.training)]
        self.scores = judge.scores(pairs, self.device)
        self.judge_name = public_name(judge.name)
        if unclear := [path for path in pairs if path not in self.scores]:
            self.notes.append(f"Answers of the judge that name no grade and are left out: {len(unclear)}.")

    # Access

    def of_role(self, role: Role, by_prompt: dict[Prompt, list[Path]]) -> list[Prompt]:
        return [prompt for prompt in self.prompts if prompt.role == role and prompt in by_prompt]

    def files_of(self, role: Role) -> list[Path]:
        return [
            path
            for by_prompt in self.drawn.values()
            for prompt in self.of_role(role, by_prompt)
            for path in by_prompt[prompt]
        ]

    def stacked(self, values: dict[Path, Any], contender: Contender, prompts: list[Prompt]) -> torch.Tensor:
        """(P, S, ...) of a contender's values; NaN for a picture without one."""
        rows = [[values.get(path, torch.nan) for path in self.drawn[contender][prompt]] for prompt in prompts]
        return torch.stack([torch.stack([torch.as_tensor(value) for value in row]) for row in rows])

    # Figures

    def comparison(self, settings: dict[str, Any]) -> Comparison:
        found = {contender.name: self.figures_of(contender) for contender in self.drawn}
        reference = self.reference()
        self.add_notes()
        keys = {key for figures_of in found.values() for key in figures_of}
        columns = [column for column in self.possible_columns() if column.key in keys]
        return Comparison(settings, self.prompts, columns, found, reference, self.notes)

    def possible_columns(self) -> list[Column]:
        """In the order of the page."""
        names = {
            DINO: public_name(self.models.dino.name_or_path),
            CLIP: public_name(self.models.clip.name_or_path),
            JUDGE: self.judge_name,
        }
        found = []
        for quantities in GROUPS.values():
            for quantity in quantities:
                found.append(column(quantity))
                found += [column(quantity, kind, name) for kind, name in names.items()]
        return found

    def figures_of(self, contender: Contender) -> dict[str, Figure]:
        """Column's key -> figure, without those that cannot be measured."""
        values = self.concept_values(contender) | self.unrelated_values(contender) | self.leakage_values(contender)
        found = {key: figures.summary(of_pictures) for key, of_pictures in values.items()}
        diversity = f"{DIVERSITY}/{DINO}"
        if diversity in values:
            num_prompts, num_seeds = values[diversity].shape
            num_pairs = num_prompts * num_seeds * (num_seeds - 1) // 2
            figure = figures.summary(values[diversity], num_pairs)
            # Of two seeds, both have the same value, their distance: that they do not differ says nothing.
            found[diversity] = figure if num_seeds > 2 else replace(figure, over_seeds=None)
        return {key: figure for key, figure in found.items() if figure is not None}

    def concept_values(self, contender: Contender) -> dict[str, torch.Tensor]:
        """Column's key -> (P, S) values on the prompts for the subject."""
        prompts = self.of_role("concept", self.drawn[contender])
        if not prompts:
            return {}
        values = {}
        for (kind, is_masked), features in self.features.items():
            drawn = self.stacked(features.drawn, contender, prompts)
            name = f"{LIKENESS}_{MASKED}" if is_masked else LIKENESS
            values[f"{name}/{kind}"] = figures.likeness(drawn, features.training)
        features = self.features[DINO, False]
        drawn = self.stacked(features.drawn, contender, prompts)
        values[f"{CLOSENESS}/{DINO}"] = figures.closeness(drawn, features.training)
        values[COPIES] = self.copies(contender, prompts)
        if drawn.shape[1] > 1:
            values[f"{DIVERSITY}/{DINO}"] = figures.diversity(drawn)
        if all(prompt.image is not None for prompt in prompts):
            edited = features.to_edit[[prompt.image for prompt in prompts]]
            values[f"{KEPT}/{DINO}"] = figures.cosine_by_prompt(drawn, edited)
        values[f"{FOLLOWING}/{CLIP}"] = self.following(contender, prompts)
        values[SHARPNESS] = self.over_base(self.sharpness, contender, prompts)
        values[DETAIL] = self.over_base(self.detail, contender, prompts)
        if self.judge_name is not None:
            values[f"{SCORE}/{JUDGE}"] = self.stacked(self.scores, contender, prompts)
        return values

    def unrelated_values(self, contender: Contender) -> dict[str, torch.Tensor]:
        prompts = self.of_role("unrelated", self.drawn[contender])
        if not prompts:
            return {}
        drawn, base = (self.stacked(self.features[DINO, False].drawn, of, prompts) for of in (contender, Contender()))
        return {
            f"{RETENTION}/{DINO}": figures.retention(drawn, base),
            f"{FOLLOWING_UNRELATED}/{CLIP}": self.following(contender, prompts),
            SHARPNESS_UNRELATED: self.over_base(self.sharpness, contender, prompts),
            DETAIL_UNRELATED: self.over_base(self.detail, contender, prompts),
        }

    def leakage_values(self, contender: Contender) -> dict[str, torch.Tensor]:
        values = {}
        for role, name in LEAKAGE.items():
            prompts = self.of_role(role, self.drawn[contender])
            for kind in (DINO, CLIP) if prompts else ():
                features = self.features[kind, False]
                alike, base = (
                    figures.likeness(self.stacked(features.drawn, of, prompts), features.training)
                    for of in (contender, Contender())
                )
                values[f"{name}/{kind}"] = alike - base
        return values

    def over_base(self, values: dict[Path, float], contender: Contender, prompts: list[Prompt]) -> torch.Tensor:
        mine, base = (self.stacked(values, of, prompts) for of in (contender, Contender()))
        return figures.relative_to_base(mine, base)

    def copies(self, contender: Contender, prompts: list[Prompt]) -> torch.Tensor:
        """(P, S): 1 for the copy of a training picture."""
        drawn, training = self.stacked(self.thumbnails, contender, prompts), self.training_thumbnails
        return (figures.nearest_difference(drawn, training) <= figures.copy_limit(training)).float()

    def following(self, contender: Contender, prompts: list[Prompt]) -> torch.Tensor:
        drawn = self.stacked(self.features[CLIP, False].drawn, contender, prompts)
        return figures.cosine_by_prompt(drawn, torch.stack([self.texts[prompt] for prompt in prompts]))

    def reference(self) -> dict[str, Figure]:
        """The training pictures among themselves; their spread over pictures is in the place of that over prompts."""
        found = {}
        for (kind, is_masked), features in self.features.items():
            if len(features.training) < 2:
                continue
            mean, nearest = figures.among_themselves(features.training)
            name = f"{LIKENESS}_{MASKED}" if is_masked else LIKENESS
            found[f"{name}/{kind}"] = figures.summary(mean[:, None])
            if (kind, is_masked) == (DINO, False):
                found[f"{CLOSENESS}/{DINO}"] = figures.summary(nearest[:, None])
        return found

    def add_notes(self) -> None:
        if len(self.training) < FEW_PICTURES:
            is_one = len(self.training) == 1
            pictures = "one training picture is" if is_one else f"{len(self.training)} training pictures are"
            self.notes.append(
                f"Only {pictures} known: likeness to so few pictures says little about the subject itself."
            )
        features = self.features[DINO, False]
        if len(self.training) > 1:
            nearest = float(figures.among_themselves(features.training)[1].mean())
            if nearest > NEARLY_THE_SAME:
                self.notes.append(
                    f"To the DINO model, the training pictures are nearly the same ({nearest:.2f} is the mean cosine "
                    "of each with the nearest other one), so closeness cannot tell copies from new pictures of the "
                    "subject."
                )
        unrelated = self.of_role("unrelated", self.drawn[Contender()])
        if unrelated and len(self.drawn[Contender()][unrelated[0]]) > 1:
            other = 1 - figures.diversity(self.stacked(features.drawn, Contender(), unrelated)).mean()
            self.notes.append(
                "Two of the base's pictures of one unrelated prompt, from different seeds, have a cosine of "
                f"{other:.2f} (DINO). A LoRA whose retention is lower changes these pictures more than another seed "
                "does."
            )


def thumbnail(image: Image.Image) -> torch.Tensor:
    """(D,), -1 to 1: the pixels of the picture's middle, a square, at low resolution."""
    side = THUMBNAIL_SIDE, THUMBNAIL_SIDE
    return as_tensor(ImageOps.fit(image.convert("RGB"), side, Image.Resampling.BOX)).flatten()


def opened(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")
