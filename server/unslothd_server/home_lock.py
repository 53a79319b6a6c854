"""One server a home: two would end each other's workers and write the same logs."""

import fcntl
import os
from pathlib import Path

LOCK_NAME = "server.lock"


class HomeTakenError(Exception):
    """Another server uses this home; the text names it and the next step."""


class HomeLock:
    """A lock on a home that ends with the process, however that ends.

    Args:
        home: An existing folder.

    Raises:
        HomeTakenError: Another server holds it.
    """

    def __init__(self, home: Path) -> None:
        self._file = os.open(home / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _written(self._file)
            os.close(self._file)
            raise HomeTakenError(
                f"another server (process {holder}) uses the home {home}. Stop it first, or give this one a folder of "
                "its own with --home."
            ) from None
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, f"{os.getpid()}\n".encode(), 0)

    def release(self) -> None:
        """Lets another server have the home."""
        os.close(self._file)


def holder_of(home: Path) -> str | None:
    """Returns the process id of the server that uses a home, as it wrote it; None when there is none.

    The lock is shared for an instant to see that; nothing is written.

    Raises:
        OSError: The lock cannot be read.
    """
    try:
        file = os.open(home / LOCK_NAME, os.O_RDONLY | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return _written(file)
    else:
        return None
    finally:
        os.close(file)


def _written(file: int) -> str:
    return os.pread(file, 32, 0).decode(errors="replace").strip() or "unknown"
