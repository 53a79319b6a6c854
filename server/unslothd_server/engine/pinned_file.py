"""Opens what the server has checked, and makes sure that it is still that: no link was put in its way meanwhile."""

import os
import stat
from io import BufferedReader
from pathlib import Path

from unslothd.v1.error_reason_pb2 import ErrorReason
from unslothd_server.engine.durable_files import FileSum, sum_of_open
from unslothd_server.errors import PermissionDeniedError


class PinnedFile:
    """A file that stays open: closed by `close`, or with the last reference to it.

    Args:
        file: Nothing has been read of it.
    """

    def __init__(self, file: BufferedReader) -> None:
        self._file = file
        self._state = _state_of(file)

    @property
    def name(self) -> Path:
        """A name that leads to this file, whatever lies at its path by now; good until it is closed."""
        return _name_of(self._file)

    def sum(self) -> FileSum | None:
        """Reads it whole; None when its bytes may have changed since it was opened."""
        found = sum_of_open(self._file)
        return found if _state_of(self._file) == self._state else None

    def close(self) -> None:
        """Closes it. Repeatable."""
        self._file.close()


def open_pinned(path: Path) -> PinnedFile:
    """Opens a regular file for reading and looks at what was opened, so that nothing can be swapped in between.

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
    if stat.S_ISREG(os.fstat(descriptor).st_mode) and _name_of(file).readlink() == path:
        return PinnedFile(file)
    file.close()
    raise _swapped(path)


def _name_of(file: BufferedReader) -> Path:
    return Path(f"/proc/self/fd/{file.fileno()}")


def _state_of(file: BufferedReader) -> tuple[int, int]:
    """What changes when somebody writes to it; a rename or a removal of its name changes nothing."""
    status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns


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
