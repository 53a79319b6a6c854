"""Disks that take no more, in the many forms in which libraries say it."""

import errno
from collections.abc import Sequence
from pathlib import Path

from unslothd_server import disk
from unslothd_server.errors import UnslothdError

FULL_TEXTS = (
    "No space left on device",
    "Disk quota exceeded",
    "File too large",
    "PytorchStreamWriter failed writing",
    "unexpected pos",  # all that torch.save says of a file that the disk did not take in whole
)
READ_ONLY_TEXTS = ("Read-only file system",)


def disk_fault(error: BaseException, folder: Path, then: str, *, needed_bytes: int = 0) -> UnslothdError | None:
    """The error of ours for a disk that takes no more: DISK_FULL or NOT_WRITABLE; None when it is something else.

    Args:
        error: As raised while files were written.
        folder: Where they were to be.
        then: What to do once the disk takes them, as the end of "…, then".
        needed_bytes: What was to be written in all; 0 = not known.
    """
    if says_full(error):
        return disk.full(folder, _first_line(error), then, needed_bytes=needed_bytes)
    if library_says(error, READ_ONLY_TEXTS):
        error = OSError(errno.EROFS, READ_ONLY_TEXTS[0])
    # A folder that may not be read is refused by the same errors.
    if isinstance(error, OSError) and (error.errno == errno.EROFS or _is_below(error.filename, folder)):
        return disk.unwritable(error, folder, then)
    return None


def says_full(error: BaseException) -> bool:
    """True when an error means that a disk, a quota, or a limit on the size of files is used up."""
    return (isinstance(error, OSError) and error.errno in disk.NO_ROOM) or library_says(error, FULL_TEXTS)


def library_says(error: BaseException, texts: Sequence[str]) -> bool:
    """True when an error of a native library has one of these texts."""
    # A plain OSError or ValueError may quote such a text from a file; only the libraries' own errors count.
    return (isinstance(error, RuntimeError) or type(error).__name__ == "SafetensorError") and any(
        text in str(error) for text in texts
    )


def _is_below(name: object, folder: Path) -> bool:
    return isinstance(name, str) and Path(name).is_relative_to(folder)


def _first_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error).partition("\n")[0]
