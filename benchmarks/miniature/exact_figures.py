"""What the drawings of `evaluate_lora.py` show, read exactly: figures beside those of feature models."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.miniature import world
from benchmarks.miniature.concepts import Concept, concept_task, neighbour_task, old_task, wrong_word_task
from benchmarks.miniature.metrics import PictureReader, Reading, detail
from benchmarks.miniature.tasks import Task
from dopsd.errors import InputError
from dopsd.evaluation.comparison import Contender, Prompt, Role
from dopsd.evaluation.pictures import slug
from dopsd.exam.pixels import as_tensor


MANY = 64  # prompts to choose from
Scene = tuple[world.Appearance, int, str]  # object; index into `world.POSES`; background


@dataclass(frozen=True)
class Asked:
    """A prompt, and what its picture is to show.

    Attributes:
        background: that it names.
    """

    prompt: Prompt
    wanted: world.Appearance
    background: str


def asked_prompts(concept: Concept, num_prompts: dict[Role, int]) -> list[Asked]:
    """The first different prompts of the miniature's tasks. Their plain words are what the pictures are to show.

    For other words, that is the concept, which none should show.
    """
    tasks: dict[Role, Task] = {
        "concept": concept_task(concept, MANY),
        "unrelated": old_task(MANY),
        "neighbour": neighbour_task(concept, MANY),
        "other_word": wrong_word_task(concept, MANY),
    }
    found = []
    for role, task in tasks.items():
        scenes = dict(zip(task.prompts, zip(task.wanted, task.backgrounds, strict=True), strict=True))
        for text, (wanted, background) in [*scenes.items()][: num_prompts[role]]:
            prompt = Prompt(text, world.caption(wanted.words, background), role)
            found.append(Asked(prompt, wanted, background))
    return found


def files_of(folder: Path, contender: Contender, prompt: Prompt, num_seeds: int) -> list[Path]:
    """The drawings of a prompt, by seed, from 0.

    Args:
        folder: of the comparison's pictures.

    Raises:
        InputError: they are not in the contender's folder, such as those of a LoRA that had another name before.
    """
    own, found = folder / slug(contender.name), []
    for seed in range(num_seeds):
        paths = [*own.glob(f"{slug(prompt.text)}-seed{seed}-*.png")]
        if len(paths) != 1:
            raise InputError(
                f"{own}: has {len(paths)} drawings of {prompt.text!r} with seed {seed}, not one; delete {folder} to "
                "draw all again"
            )
        found += paths
    return found


def read_pictures(paths: Iterable[Path]) -> torch.Tensor:
    """(N, 3, 64, 64), -1 to 1."""
    return torch.stack([as_tensor(Image.open(path)) for path in paths])


@dataclass(frozen=True)
class Seen:
    """What the drawings of one prompt show, one scene per seed.

    Attributes:
        pictures: (S, 3, 64, 64).
    """

    asked: Asked
    pictures: torch.Tensor
    reading: Reading
    scenes: list[Scene]


class ExactReader:
    """Reads the drawings of a comparison.

    Args:
        concept: that the LoRAs were taught.
        training: its training pictures.
    """

    def __init__(self, concept: Concept, training: list[Image.Image]):
        self.concept = concept
        self.reader = PictureReader(world.all_appearances())
        pixels = torch.stack([*map(as_tensor, training)])
        self.known = {*self.scenes(self.reader.read(pixels))}

    def scenes(self, reading: Reading) -> list[Scene]:
        backgrounds = [*world.BACKGROUNDS]
        places = zip(reading.objects.tolist(), reading.poses.tolist(), reading.backgrounds.tolist(), strict=True)
        return [(self.reader.appearances[index], pose, backgrounds[ground]) for index, pose, ground in places]

    def see(self, asked: Asked, pictures: torch.Tensor) -> Seen:
        reading = self.reader.read(pictures)
        return Seen(asked, pictures, reading, self.scenes(reading))

    def figures(self, seen: list[Seen], base: list[Seen]) -> dict[str, float]:
        """Of one contender. What it was not drawn for is left out.

        Args:
            seen: what its drawings show.
            base: what the base's show of the same prompts, in the same order.

        Returns:
            Shares of drawings, but for "detail" and "old detail".
            "subject": of the concept's prompts, with the concept. "as asked": with it, on the background asked for.
            "copies": with the concept at the place and on the background of a training picture. "detail": their grain
            over the base's. "changing": pairs of seeds that differ in place or object. "old right": of unrelated
            prompts, with what is asked for; "old same": in place, object and background like the base's of that seed;
            "old detail": their grain over the base's. "neighbours", "other words": of these prompts, with the concept,
            less the base's share.
        """

        def share(role: Role, is_so: Callable[[Asked, Scene], bool], of: list[Seen] = seen) -> float | None:
            values = [is_so(one.asked, scene) for one in of if one.asked.prompt.role == role for scene in one.scenes]
            return float(np.mean(values)) if values else None

        def is_subject(asked: Asked, scene: Scene) -> bool:
            return scene[0] == self.concept.appearance

        def is_as_asked(asked: Asked, scene: Scene) -> bool:
            return scene[0] == asked.wanted and scene[2] == asked.background

        subjects, unrelated = (
            [pair for pair in zip(seen, base, strict=True) if pair[0].asked.prompt.role == role]
            for role in ("concept", "unrelated")
        )
        pairs = [a != b for one, _ in subjects for a, b in combinations([scene[:2] for scene in one.scenes], 2)]
        same = [a == b for one, other in unrelated for a, b in zip(one.scenes, other.scenes, strict=True)]
        found = {
            "subject": share("concept", is_subject),
            "as asked": share("concept", is_as_asked),
            "copies": share("concept", lambda asked, scene: scene in self.known),
            "detail": self.relative_detail(subjects) if subjects else None,
            "changing": float(np.mean(pairs)) if pairs else None,
            "old detail": self.relative_detail(unrelated) if unrelated else None,
            "old right": share("unrelated", is_as_asked),
            "old same": float(np.mean(same)) if same else None,
        }
        for name, role in (("neighbours", "neighbour"), ("other words", "other_word")):
            own = share(role, is_subject)
            found[name] = None if own is None else own - share(role, is_subject, base)
        return {name: round(value, 4) for name, value in found.items() if value is not None}

    @staticmethod
    def relative_detail(pairs: list[tuple[Seen, Seen]]) -> float:
        """The grain of the first drawings over that of the second ones."""
        first, second = (
            np.mean([detail(one.pictures, one.reading) for one in seen]) for seen in zip(*pairs, strict=True)
        )
        return float(first / second)
