"""The files of a local model: looked at before libraries open them by their names, and once more afterwards.

Whoever can write to a model root can put another file there in between. Nothing keeps a library from reading it; but
what was read is thrown away then. That no file runs code, whichever it is, has to be asked of the libraries.
"""

import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

from unslothd.v1.error_reason_pb2 import ErrorReason
from unslothd_server.errors import PermissionDeniedError

# What tells one file from another, and from itself with other bytes. The time of the last change of the inode, which
# nobody can set, also tells a file that was moved away and back.
_Identity = tuple[int, int, int, int, int]


class ModelFiles:
    """Everything at some places, as it was when this was made.

    Args:
        places: Absolute folders and files; everything below a folder counts.
        roots: Where all of it must really lie, links followed; none = anywhere.

    Raises:
        PermissionDeniedError: Something leads out of the roots, or is neither a file nor a folder (PATH_NOT_ALLOWED).
    """

    def __init__(self, places: Sequence[Path], roots: Sequence[Path]) -> None:
        self._places = tuple(places)
        self._roots = tuple(root.resolve() for root in roots)
        self._seen = self._look()

    def require_unchanged(self) -> None:
        """Looks again.

        Raises:
            PermissionDeniedError: Something is not what it was (PATH_NOT_ALLOWED).
        """
        seen = self._look()
        for path in sorted(self._seen.keys() | seen.keys(), reverse=True):  # what is in a folder before the folder
            if self._seen.get(path) != seen.get(path):
                raise changed(f'"{path}" changed while the model was read')

    def _look(self) -> dict[Path, tuple[_Identity, _Identity | None]]:
        """The identity of each entry, and of what it leads to; the same, unless it is a link."""
        try:
            return {path: (_identity(path.lstat()), self._target(path)) for path in _everything(self._places)}
        except FileNotFoundError as error:
            raise changed(f'"{error.filename}" was removed while it was looked at') from None

    def _target(self, path: Path) -> _Identity | None:
        """None for a link that leads to nothing."""
        try:
            real = path.resolve()
            status = path.stat()
        except (OSError, RuntimeError):  # RuntimeError: links in a circle
            return None
        if self._roots and not any(real.is_relative_to(root) for root in self._roots):
            raise changed(f'"{path}" leads out of the folders that this server may read')
        if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
            raise changed(f'"{path}" is neither a file nor a folder')
        return _identity(status)


def _identity(status: os.stat_result) -> _Identity:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _everything(places: Sequence[Path]) -> Iterator[Path]:
    """The places and what is below them, also below folders that links lead to; each folder once."""
    waiting, seen = list(places), set[Path]()
    while waiting:
        path = waiting.pop()
        yield path
        if path.is_dir() and (real := path.resolve()) not in seen:
            seen.add(real)
            waiting.extend(path.iterdir())


def changed(what: str) -> PermissionDeniedError:
    """The error for a model that is not what was looked at."""
    return PermissionDeniedError(
        ErrorReason.ERROR_REASON_PATH_NOT_ALLOWED,
        f"{what}, so nothing of it is used. Load it again once nobody changes these files.",
    )
