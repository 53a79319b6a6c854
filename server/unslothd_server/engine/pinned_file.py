"""Opens what the server has checked, and makes sure that it is still that: no link was put in its way meanwhile."""

import os
import stat
from io import BufferedReader
from pathlib import Path

from unslothd.v1.error_reason_pb2 import ErrorReason
from unslothd_server.errors import PermissionDeniedError


def open_pinned(path: Path) -> BufferedReader:
    """Opens a regular file for reading and looks at what was opened, so that nothing can be swapped in between.

    Whoever reads by name has to take `name_of` what this returns.

    Args:
        path: As the server checked it: absolute and without any link.

    Raises:
        FileNotFoundError: It is not there.
        PermissionDeniedError: It is another file than the path says, or no regular one (PATH_NOT_ALLOWED).
    """
    try:
        # A pipe that nobody writes to would be waited for, without O_NONBLOCK.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise
    except OSError:  # its last part is a link
        raise _swapped(path) from None
    file = os.fdopen(descriptor, "rb")
    if stat.S_ISREG(os.fstat(descriptor).st_mode) and name_of(file).readlink() == path:
        return file
    file.close()
    raise _swapped(path)


def name_of(file: BufferedReader) -> Path:
    """A name that leads to an open file, whatever lies at its path by now; good until it is closed."""
    return Path(f"/proc/self/fd/{file.fileno()}")


def check_in_place(folder: Path) -> None:
    """Refuses a folder that a link leads to by now. Libraries open its files by name: this only narrows the time.

    Raises:
        PermissionDeniedError: PATH_NOT_ALLOWED.
    """
    if folder.resolve() != folder:
        raise _swapped(folder)


def _swapped(path: Path) -> PermissionDeniedError:
    return PermissionDeniedError(
        ErrorReason.ERROR_REASON_PATH_NOT_ALLOWED,
        f'"{path}" was replaced after the server had checked it, by a link or what is no regular file. Put the file '
        "itself there and call again.",
    )
