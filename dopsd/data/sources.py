"""Pictures and captions from a folder or a data set."""

from ..errors import InputError
from ..settings import DataSettings
from .dataset import read_dataset
from .folder import read_folder
from .pictures import Picture


def read_pictures(
    settings: DataSettings, *, teacher_caption_column: str | None, cache_dir: str | None
) -> list[Picture]:
    """Lists the pictures of `--instance_data_dir` or `--dataset_name` with their captions and the pictures to edit.

    Decodes no picture.

    Args:
        settings: where the pictures are and which columns to read.
        teacher_caption_column: column with the teacher's captions. If it is given, captions need no training pictures.
        cache_dir: folder for downloaded data sets. Default: the cache of `datasets`.

    Returns:
        The pictures of a folder sorted by path, those of a data set in row order.

    Raises:
        InputError: a picture has no caption or a caption no picture, a picture to edit is missing, a file is
            malformed, or the flags do not fit the data.
    """
    if (settings.instance_data_dir is None) == (settings.dataset_name is None):
        raise InputError(
            "--instance_data_dir, --dataset_name: exactly one of them is required; give a folder of pictures or a "
            "data set"
        )
    if settings.dataset_name is None:
        return read_folder(settings, teacher_caption_column)
    return read_dataset(settings, teacher_caption_column, cache_dir)
