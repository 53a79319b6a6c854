"""The disk: names that outlive a power cut, and in words what is to be done when a write fails."""

import errno
import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from unslothd.v1.error_reason_pb2 import ErrorReason
from unslothd_server.errors import ExhaustedError

# EFBIG: the limit on the size of a file (ulimit -f, LimitFSIZE=) or of the file system is reached.
NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
READ_ONLY = frozenset({errno.EROFS, errno.EACCES, errno.EPERM})


def unwritable(error: OSError, folder: Path, then: str) -> ExhaustedError | None:
    """The error of ours for a folder that takes no more writes; None when the cause is another one.

    Args:
        error: As raised.
        folder: What could not be written to.
        then: What to do once it can be, as the end of "…, then".
    """
    if error.errno in NO_ROOM:
        text = f"The disk that holds {folder} is full ({_said(error)}). Free some space, then {then}."
    elif error.errno in READ_ONLY:
        text = f"{folder} cannot be written to ({_said(error)}). Make it writable for the server's user, then {then}."
    else:
        return None
    return ExhaustedError(ErrorReason.ERROR_REASON_DISK_FULL, text)


@contextmanager
def telling(folder: Path, then: str) -> Generator[None]:
    """Raises ExhaustedError (DISK_FULL) in place of an OSError that means that the folder takes no more writes."""
    try:
        yield
    except OSError as error:
        known = unwritable(error, folder, then)
        if known is None:
            raise
        raise known from error


def sync_folder(folder: Path) -> None:
    """Brings a folder's list of names to the disk: a file that was made or renamed is there after a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _said(error: OSError) -> str:
    return os.strerror(error.errno) if error.errno is not None else str(error)
