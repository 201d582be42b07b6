"""Pictures and captions from `--instance_data_dir`."""

from pathlib import Path

from accelerate.logging import get_logger

from ..errors import InputError
from ..settings import DataSettings
from .captions import prompt_captions, sidecar_captions
from .metadata import find_metadata, metadata_pictures
from .pictures import Picture, is_picture, visible_files


logger = get_logger(__name__)

MAX_NAMES_IN_WARNING = 5


def read_folder(settings: DataSettings, teacher_caption_column: str | None) -> list[Picture]:
    """The pictures of `--instance_data_dir`, sorted by path.

    Captions come from a metadata file, else from .txt files, else from `--instance_prompt`. See
    `sources.read_pictures` for the arguments and errors.
    """
    folder = _existing_folder(settings.instance_data_dir)
    names = sorted(path.relative_to(folder).as_posix() for path in visible_files(folder))
    pictures = [name for name in names if is_picture(name)]
    sidecars = [name for name in names if name.lower().endswith(".txt")]
    metadata = find_metadata(names)
    _warn_of_ignored_files(sorted({*names} - {*pictures, *sidecars, metadata}))
    if not pictures and teacher_caption_column is None:
        raise InputError(f"--instance_data_dir {folder}: contains no pictures; give a folder with pictures")
    if metadata and sidecars:
        raise InputError(
            f"{metadata}, {sidecars[0]}: both contain captions; keep either the metadata file or the .txt files"
        )
    if metadata:
        return metadata_pictures(folder, metadata, pictures, settings, teacher_caption_column)
    _refuse_column_flags(settings, teacher_caption_column)
    if sidecars:
        captions = sidecar_captions(folder, sidecars, pictures, settings.instance_prompt)
    else:
        captions = prompt_captions(pictures, settings)
    return [Picture(name, (captions[name],), folder / name) for name in pictures]


def _existing_folder(name: str) -> Path:
    if not name.strip():
        raise InputError(f"--instance_data_dir {name!r}: is blank; give the folder with the pictures")
    folder = Path(name)
    if not folder.exists():
        raise InputError(f"--instance_data_dir {folder}: does not exist; check the path")
    if not folder.is_dir():
        raise InputError(f"--instance_data_dir {folder}: is a file; give the folder that contains it")
    return folder


def _warn_of_ignored_files(names: list[str]) -> None:
    if names:
        num_more = len(names) - MAX_NAMES_IN_WARNING
        more = f" and {num_more} more" if num_more > 0 else ""
        shown = ", ".join(names[:MAX_NAMES_IN_WARNING])
        logger.warning(f"Ignoring files that are neither pictures nor captions: {shown}{more}")


def _refuse_column_flags(settings: DataSettings, teacher_caption_column: str | None) -> None:
    """Raises `InputError` for a flag that names a column, since there is no metadata file."""
    for flag, is_given in (
        ("--caption_column", bool(settings.caption_column)),
        ("--image_column", settings.image_column != "image"),
        ("--teacher_caption_column", teacher_caption_column is not None),
    ):
        if is_given:
            raise InputError(
                f"{flag}: needs a metadata.jsonl or metadata.csv in --instance_data_dir; add one, or drop the flag"
            )
