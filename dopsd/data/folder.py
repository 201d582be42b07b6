"""Pictures and captions from `--instance_data_dir`."""

import posixpath
from dataclasses import dataclass
from pathlib import Path

from accelerate.logging import get_logger

from ..errors import InputError
from ..settings import DataSettings
from ..sharing import in_threads
from ..text import printable
from .captions import is_text
from .files import FolderFiles, warn_of_links_out
from .metadata import find_metadata, metadata_pictures
from .pictures import Picture, is_picture
from .sidecars import check_sidecars, match_sidecars, read_lines, sidecar_captions


logger = get_logger(__name__)

MAX_NAMES_IN_WARNING = 5


@dataclass(frozen=True)
class Folder:
    """The files of `--instance_data_dir`, none of which has been read.

    Attributes:
        files: all of them.
        pictures, texts: names of the pictures, and of the .txt files.
        metadata: name of the metadata file, if there is one.
        text_of: picture -> the .txt file with its captions.
    """

    files: FolderFiles
    pictures: list[str]
    texts: list[str]
    metadata: str | None
    text_of: dict[str, str]

    @property
    def sidecars(self) -> list[str]:
        """Names of the .txt files with captions, sorted."""
        return sorted({*self.text_of.values()})

    def read_sidecars(self, names: list[str]) -> list[list[str]]:
        """The lines of each of these .txt files, see `sidecars.read_lines`."""
        return list(in_threads(lambda name: read_lines(self.files.paths[name], name), names))


def list_folder(settings: DataSettings, teacher_caption_column: str | None) -> Folder:
    """The files of `--instance_data_dir`. See `sources.read_pictures` for the arguments and errors."""
    folder = _existing_folder(settings.instance_data_dir)
    files = FolderFiles(folder)
    names = list(files.paths)
    pictures = [name for name in names if is_picture(name)]
    texts = [name for name in names if name.lower().endswith(".txt")]
    metadata = find_metadata(names)
    found = Folder(files, pictures, texts, metadata, match_sidecars(pictures, texts))
    if not pictures and teacher_caption_column is None:
        ignored = _ignored(found)
        only = f", only files such as {ignored[0]}" if ignored else ""
        raise InputError(f"--instance_data_dir {folder}: contains no pictures{only}; give a folder with pictures")
    if metadata and found.text_of:
        raise InputError(
            f"{metadata}, {next(iter(found.text_of.values()))}: both contain captions; keep either the metadata file "
            "or the .txt files"
        )
    if settings.multiline_captions is not None and not found.text_of:
        raise InputError("--multiline_captions: needs a .txt file beside each picture; add them, or drop the flag")
    if not metadata:
        _refuse_column_flags(settings, teacher_caption_column)
        if found.text_of:
            check_sidecars(pictures, texts, found.text_of)
    return found


def folder_pictures(
    folder: Folder, lines: list[list[str]], settings: DataSettings, teacher_caption_column: str | None
) -> list[Picture]:
    """The pictures of `--instance_data_dir`, sorted by path.

    Captions come from a metadata file, else from .txt files, else from `--instance_prompt`. See
    `sources.read_pictures` for other arguments and errors.

    Args:
        lines: of `folder.sidecars`.
    """
    files, ignored = folder.files, _ignored(folder)
    if folder.metadata:
        found = metadata_pictures(files, folder.metadata, folder.pictures, settings, teacher_caption_column)
    else:
        if folder.text_of:
            in_text = sidecar_captions(dict(zip(folder.sidecars, lines, strict=True)), settings)
            captions = {name: in_text[folder.text_of[name]] for name in folder.pictures}
        else:
            captions = dict.fromkeys(folder.pictures, (_prompt(settings, folder.texts),))
            _warn_of_ignored_texts(folder.texts)
            ignored = sorted({*ignored} - {*folder.texts})
        found = [
            Picture(name, captions[name], files.paths[name], group=posixpath.dirname(name)) for name in folder.pictures
        ]
    _warn_of_ignored_files(ignored)
    read = {
        file.name: file.source
        for picture in found
        for file in (picture.file, *picture.cond_images)
        if file.source is not None
    }
    read |= {name: files.paths[name] for name in (*folder.text_of.values(), folder.metadata) if name}
    warn_of_links_out(files.folder, read)
    return found


def _ignored(folder: Folder) -> list[str]:
    """Names of the files that are neither pictures nor captions."""
    used = {*folder.pictures, *folder.text_of.values(), folder.metadata}
    return [name for name in folder.files.paths if name not in used]


def _existing_folder(name: str) -> Path:
    if not name.strip():
        raise InputError(f"--instance_data_dir {name!r}: is blank; give the folder with the pictures")
    folder = Path(name)
    try:
        exists = folder.exists()
    except OSError as error:  # the name is too long, or a parent folder cannot be read
        raise InputError(f"--instance_data_dir {folder}: cannot be read ({error.strerror}); check the path") from error
    if not exists:
        raise InputError(f"--instance_data_dir {folder}: does not exist; check the path")
    if not folder.is_dir():
        raise InputError(f"--instance_data_dir {folder}: is a file; give the folder that contains it")
    return folder


def _prompt(settings: DataSettings, texts: list[str]) -> str:
    """`--instance_prompt`, which the pictures need since they have no captions.

    Args:
        texts: names of the .txt files, of which none has the name of a picture.
    """
    if is_text(settings.instance_prompt):
        return settings.instance_prompt
    if texts:
        raise InputError(
            f"{texts[0]}: no picture beside it has this name, nor do other .txt files fit a picture ({len(texts)} in "
            "all); name each picture's .txt file like the picture, or pass one --instance_prompt for all pictures"
        )
    raise InputError(
        f"--instance_data_dir {settings.instance_data_dir}: its pictures have no captions; pass "
        "--instance_prompt, or add a .txt file beside each picture, or a metadata.jsonl or metadata.csv at the top"
    )


def _warn_of_ignored_files(names: list[str]) -> None:
    if names:
        logger.warning(f"Ignoring files that are neither pictures nor captions: {_first_names(names)}")


def _warn_of_ignored_texts(names: list[str]) -> None:
    if names:
        logger.warning(
            "--instance_prompt is the caption of every picture; ignoring .txt files, since none has the name of a "
            f"picture: {_first_names(names)}"
        )


def _first_names(names: list[str]) -> str:
    num_more = len(names) - MAX_NAMES_IN_WARNING
    more = f" and {num_more} more" if num_more > 0 else ""
    return printable(", ".join(names[:MAX_NAMES_IN_WARNING])) + more


def _refuse_column_flags(settings: DataSettings, teacher_caption_column: str | None) -> None:
    """Raises `InputError` for a flag that names a column, since there is no metadata file."""
    for flag, is_given in (
        ("--caption_column", bool(settings.caption_column)),
        ("--image_column", settings.image_column != "image"),
        ("--cond_image_column", settings.cond_image_column is not None),
        ("--group_column", settings.group_column is not None),
        ("--teacher_caption_column", teacher_caption_column is not None),
    ):
        if is_given:
            raise InputError(
                f"{flag}: needs a metadata.jsonl or metadata.csv in --instance_data_dir; add one, or drop the flag"
            )
