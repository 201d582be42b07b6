"""The pictures of a comparison: training pictures, pictures to edit, and the store of what is drawn."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from accelerate.logging import get_logger
from PIL import Image
from tqdm.auto import tqdm

from ..context_cache import content_key
from ..data.captions import is_text
from ..data.columns import is_path_column
from ..data.folder import Folder, folder_pictures, list_folder
from ..data.images import PILLOW_ERRORS, decode
from ..data.metadata import read_rows
from ..data.pictures import Picture
from ..data.requests import read_images
from ..errors import InputError
from ..output import naming_file
from ..settings import DataSettings
from ..sharing import in_threads
from ..sheets import save_png
from ..sizes import SizeLimits
from .comparison import Contender, Prompt
from .settings import EvaluationSettings


logger = get_logger(__name__)

MIN_PICTURES = 2  # each is compared with the others
MAX_PICTURES = 200
NO_CAPTION = "-"  # of pictures in a metadata file without texts
# Feature models see less than this.
MAX_SIDE = 1024

PICTURES_DIR = "pictures"
# Increased when the same key may stand for another picture.
STORE_FORMAT = 1
KEY_DIGITS = 20
_NAME = re.compile(rf"-([0-9a-f]{{{KEY_DIGITS}}})\.png$")


# What is read


@dataclass(frozen=True)
class TrainingPictures:
    """What the LoRAs were trained on.

    Attributes:
        images: RGB, shrunk to at most `MAX_SIDE` pixels per side; of many pictures, a part that is spread evenly.
        digests: SHA-256 of their files.
        captions: of all pictures, and that of `--instance_prompt`.
    """

    images: list[Image.Image]
    digests: list[str]
    captions: list[str]


def read_training_pictures(settings: EvaluationSettings) -> TrainingPictures:
    """Reads `--instance_data_dir`, whose pictures need no captions.

    Raises:
        InputError: there are too few pictures, or one cannot be read.
    """
    data = DataSettings(
        instance_data_dir=settings.instance_data_dir,
        image_column=settings.image_column,
        caption_column=settings.caption_column,
        cond_image_column=settings.cond_image_column,
    )
    folder = list_folder(data, None)
    if folder.metadata and not data.caption_column:
        columns = text_columns(folder, data)
        data = replace(data, caption_column=columns or None, instance_prompt=None if columns else NO_CAPTION)
    if folder.metadata or folder.text_of:
        found = folder_pictures(folder, folder.read_sidecars(folder.sidecars), data, None)
    else:
        found = [Picture(name, (), folder.files.paths[name]) for name in folder.pictures]
    if len(found) < MIN_PICTURES:
        raise InputError(
            f"--instance_data_dir {settings.instance_data_dir}: holds only {len(found)} training picture, but they "
            f"are compared with each other; give the folder with all of them, at least {MIN_PICTURES}"
        )
    used = [found[index * len(found) // MAX_PICTURES] for index in range(MAX_PICTURES)]
    used = found if len(found) <= MAX_PICTURES else used
    if len(used) < len(found):
        logger.info(f"--instance_data_dir: {len(used)} of the {len(found)} pictures are used")

    def read(picture: Picture) -> tuple[Image.Image, str]:
        image, digest, _ = decode(picture)
        image.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
        return image, digest

    images, digests = zip(*tqdm(in_threads(read, used), "Reading pictures", len(used), leave=False), strict=True)
    captions = dict.fromkeys(caption for picture in found for caption in picture.captions)
    if settings.instance_prompt is not None:
        captions.setdefault(settings.instance_prompt)
    return TrainingPictures(list(images), list(digests), list(captions))


def text_columns(folder: Folder, data: DataSettings) -> list[str]:
    """The columns of a folder's metadata file with a text in every row."""
    rows = read_rows(folder.files.paths[folder.metadata], folder.metadata)
    others = {data.image_column, *(data.cond_image_column or ())}
    return [
        column
        for column in dict.fromkeys(column for row in rows for column in row.values)
        if not is_path_column(column) and column not in others and all(is_text(row.values.get(column)) for row in rows)
    ]


@dataclass(frozen=True)
class Edited:
    """The pictures that one prompt edits, and the size of the result.

    Attributes:
        images: RGB; the first one has the result's size.
        size: (height, width) in pixels.
        digest: of all of them.
    """

    images: tuple[Image.Image, ...]
    size: tuple[int, int]
    digest: str


def read_edited(settings: EvaluationSettings, limits: SizeLimits) -> list[Edited]:
    """The pictures of `--validation_image`, in their order; none without the flag.

    Raises:
        InputError: a picture cannot be read, or has a size that the model does not take.
    """
    edited = []
    for names in settings.validation_image or ():
        crops, size = read_images(names, settings.height * settings.width, limits)
        images = tuple(crop.apply(decode(crop.file).image) for crop in crops)
        edited.append(Edited(images, size, content_key([crop.digest for crop in crops])))
    return edited


# What is drawn


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
        basis: what all keys depend on: the checkpoint, the sampling steps and so on.
        size: (height, width) in pixels, of what is drawn from the text alone.
        edited: the pictures to edit.
    """

    def __init__(self, folder: Path, basis: dict[str, Any], size: tuple[int, int], edited: Iterable[Edited] = ()):
        self.folder, self.basis, self._size, self.edited = folder, basis, size, list(edited)
        self._path_of = {
            match[1]: path for path in sorted(folder.glob("*/*.png")) if (match := _NAME.search(path.name))
        }

    def size(self, prompt: Prompt) -> tuple[int, int]:
        """(height, width) in pixels of what is drawn for the prompt."""
        return self._size if prompt.image is None else self.edited[prompt.image].size

    def key(self, job: Job) -> str:
        """Covers all that the picture depends on. A LoRA counts by its content, whatever it is called."""
        contender, prompt = job.contender, job.prompt
        return content_key(
            STORE_FORMAT,
            self.basis,
            [lora.digest for lora in contender.loras],
            float(contender.strength) if contender.loras else 1.0,
            prompt.text,
            self.size(prompt),
            None if prompt.image is None else self.edited[prompt.image].digest,
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
                has_size = image.size[::-1] == self.size(job.prompt)
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
            save_png(image, path, compress_level=1)
        self._path_of[self.key(job)] = path


def slug(text: str, max_characters: int = 40) -> str:
    """A part of a file's name that says what it is about."""
    return re.sub(r"[^a-z0-9.+]+", "-", text.lower())[:max_characters].strip("-.") or "picture"
