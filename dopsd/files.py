"""Reading files that a user may have put anything in the place of."""

import errno
import stat
from pathlib import Path


def read_regular_file(path: Path, max_bytes: int | None = None) -> bytes:
    """Reads a file.

    Raises:
        OSError: it cannot be read, has more than `max_bytes`, or is a pipe, socket or device, which may have no end.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    if max_bytes is not None and status.st_size > max_bytes:
        raise OSError(errno.EFBIG, f"more than {max_bytes:,} bytes", str(path))
    return path.read_bytes()
