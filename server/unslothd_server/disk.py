"""The disk: names that outlive a power cut, and in words what is to be done when a write fails."""

import errno
import os
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from unslothd.v1.error_reason_pb2 import ErrorReason
from unslothd_server.errors import ExhaustedError, PreconditionError, UnslothdError

# EFBIG: the limit on the size of a file (ulimit -f, LimitFSIZE=) or of the file system is reached.
NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
READ_ONLY = frozenset({errno.EROFS, errno.EACCES, errno.EPERM})


def unwritable(error: OSError, folder: Path, then: str) -> UnslothdError | None:
    """The error of ours for a folder that takes no more writes: DISK_FULL or NOT_WRITABLE; None for another cause.

    Args:
        error: As raised.
        folder: What could not be written to.
        then: What to do once it can be, as the end of "…, then".
    """
    if error.errno in NO_ROOM:
        return full(folder, _said(error), then)
    if error.errno in READ_ONLY:
        return PreconditionError(
            ErrorReason.ERROR_REASON_NOT_WRITABLE,
            f"{folder} cannot be written to ({_said(error)}). Make it writable for the server's user, then {then}.",
        )
    return None


def full(folder: Path, said: str, then: str, *, needed_bytes: int = 0) -> ExhaustedError:
    """The error of a disk without room (DISK_FULL); its metadata are path, free_bytes and needed_bytes, where known.

    Args:
        folder: What could not be written to.
        said: How the system or a library put it.
        then: What to do once there is room, as the end of "…, then".
        needed_bytes: What the write takes in all; 0 = not known.
    """
    facts, metadata = [said], {"path": str(folder)}
    # What is free says nothing where it is a limit on the size of a file that is reached.
    if folder.exists() and os.strerror(errno.EFBIG) not in said:
        free = shutil.disk_usage(folder).free
        facts.append(f"{in_units(free)} free")
        metadata["free_bytes"] = str(free)
    if needed_bytes:
        facts.append(f"about {in_units(needed_bytes)} needed")
        metadata["needed_bytes"] = str(needed_bytes)
    return ExhaustedError(
        ErrorReason.ERROR_REASON_DISK_FULL,
        f"The disk that holds {folder} is full ({', '.join(facts)}). Free some space, then {then}.",
        metadata=metadata,
    )


def in_units(size: int) -> str:
    """Bytes for people, e.g. "1.5 GiB"."""
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size} bytes"


@contextmanager
def telling(folder: Path, then: str) -> Generator[None]:
    """Raises DISK_FULL or NOT_WRITABLE in place of an OSError that means that the folder takes no more writes."""
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
