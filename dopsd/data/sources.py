"""Pictures and captions from a folder or a data set."""

from accelerate import Accelerator

from ..errors import InputError
from ..settings import DataSettings
from ..sharing import failing_together, share_on_own_machine
from .dataset import read_dataset
from .folder import folder_pictures, list_folder
from .pictures import Picture


def read_pictures(
    settings: DataSettings, accelerator: Accelerator, *, teacher_caption_column: str | None, cache_dir: str | None
) -> list[Picture]:
    """Lists the pictures of `--instance_data_dir` or `--dataset_name` with their captions and the pictures to edit.

    Decodes no picture. Each .txt file is read by one of a machine's processes.

    Args:
        settings: where the pictures are and which columns to read.
        accelerator: of this process.
        teacher_caption_column: column with the teacher's captions. If it is given, captions need no training pictures.
        cache_dir: folder for downloaded data sets. Default: the cache of `datasets`.

    Returns:
        The pictures of a folder sorted by path, those of a data set in row order.

    Raises:
        InputError: a picture has no caption or a caption no picture, a picture to edit is missing, a file is
            malformed, or the flags do not fit the data. All processes raise it.
    """
    with failing_together():
        if (settings.instance_data_dir is None) == (settings.dataset_name is None):
            raise InputError(
                "--instance_data_dir, --dataset_name: exactly one of them is required; give a folder of pictures or a "
                "data set"
            )
        if settings.dataset_name is not None:
            return read_dataset(settings, teacher_caption_column, cache_dir)
        folder = list_folder(settings, teacher_caption_column)
    lines = share_on_own_machine(folder.read_sidecars, folder.sidecars, accelerator)
    with failing_together():
        return folder_pictures(folder, lines, settings, teacher_caption_column)
