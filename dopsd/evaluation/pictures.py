"""The pictures of a comparison on disk: each is found by what it depends on, and drawn only once."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ..context_cache import content_key
from ..data.images import PILLOW_ERRORS
from ..output import naming_file, replacing
from .comparison import Contender, Prompt


PICTURES_DIR = "pictures"
# Increased when the same key may stand for another picture.
STORE_FORMAT = 1
KEY_DIGITS = 20
_NAME = re.compile(rf"-([0-9a-f]{{{KEY_DIGITS}}})\.png$")


@dataclass(frozen=True)
class Job:
    """A picture to draw.

    Attributes:
        seed: of its noise.
    """

    contender: Contender
    prompt: Prompt
    seed: int


class PictureStore:
    """PNG files in folders by contender. A picture is found by its key, whatever its folder is called.

    Args:
        folder: of all pictures; created when the first one is saved.
        basis: what all keys depend on: the checkpoint, the size, the sampling steps and so on.
        image_digests: of the pictures to edit, in their order.
    """

    def __init__(self, folder: Path, basis: dict[str, Any], image_digests: Iterable[str] = ()):
        self.folder, self.basis, self.image_digests = folder, basis, list(image_digests)
        self._path_of = {
            match[1]: path for path in sorted(folder.glob("*/*.png")) if (match := _NAME.search(path.name))
        }

    def key(self, job: Job) -> str:
        """Covers all that the picture depends on. A LoRA counts by its content, whatever it is called."""
        contender, prompt = job.contender, job.prompt
        return content_key(
            STORE_FORMAT,
            self.basis,
            [lora.digest for lora in contender.loras],
            float(contender.strength) if contender.loras else 1.0,
            prompt.text,
            None if prompt.image is None else self.image_digests[prompt.image],
            job.seed,
        )[:KEY_DIGITS]

    def path(self, job: Job) -> Path:
        """Where the picture is, or will be."""
        key = self.key(job)
        if key in self._path_of:
            return self._path_of[key]
        name = f"{slug(job.prompt.text)}-seed{job.seed}-{key}.png"
        return self.folder / slug(job.contender.name) / name

    def has(self, job: Job) -> bool:
        """Whether the picture is there and undamaged. Its checksums are verified, no pixel is decoded."""
        try:
            with Image.open(self.path(job)) as image:
                has_size = image.size == (self.basis["width"], self.basis["height"])
                image.verify()
            return has_size
        except PILLOW_ERRORS:
            return False

    def save(self, job: Job, image: Image.Image) -> None:
        """Writes the picture completely or not at all.

        Raises:
            OutputError: it cannot be written.
        """
        path = self.path(job)
        with naming_file(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as temporary:
                image.save(temporary, format="PNG")
        self._path_of[self.key(job)] = path


def slug(text: str, max_characters: int = 40) -> str:
    """A part of a file's name that says what it is about."""
    return re.sub(r"[^a-z0-9.+]+", "-", text.lower())[:max_characters].strip("-.") or "picture"
