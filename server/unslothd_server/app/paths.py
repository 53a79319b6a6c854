"""Which paths a request may name: only what lies below the roots that the operator allows, links followed."""

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from unslothd.v1.error_reason_pb2 import ErrorReason
from unslothd_server.errors import NotFoundError, PermissionDeniedError

# A dataset or model has far fewer; a folder with more is somebody's whole disk.
MOST_ENTRIES = 20_000


class AllowedRoots:
    """Folders that requests may read from.

    Args:
        roots: Absolute folders; they need not exist yet.
        untold: Further ones, which no error text names: the server's own.
    """

    def __init__(self, roots: Sequence[Path], untold: Sequence[Path] = ()) -> None:
        self._told = tuple(roots)
        self._roots = (*roots, *untold)

    def __str__(self) -> str:
        return ", ".join(str(root) for root in self._told) or "(none)"

    def contains(self, path: Path) -> bool:
        """True when the path, every link followed, lies below a root."""
        real = real_path(path)
        return real is not None and any(real.is_relative_to(root.resolve()) for root in self._roots)

    def find(self, name: str) -> Path | None:
        """Returns the file or folder that `name` means: absolute, or relative to the first root that has it.

        Returns:
            Its real path, without any link, which is what was checked; None when nothing is there. Pipes, sockets and
            devices count as nothing.

        Raises:
            PermissionDeniedError: It is, or leads to, a place outside the roots (whether or not anything is there).
        """
        for candidate in self._candidates(name):
            real = real_path(candidate)
            if real is None:
                continue
            self.check(real, candidate)
            if is_file_or_folder(real):
                return real
        return None

    def _candidates(self, name: str) -> list[Path]:
        try:
            path = Path(name).expanduser()
        except RuntimeError:  # "~somebody", who has no home here
            return []
        return [path] if path.is_absolute() else [root / path for root in self._roots]

    def check(self, path: Path, asked: Path | None = None) -> None:
        """Raises PermissionDeniedError when the path lies outside the roots; its text names `asked`, if given."""
        if not self.contains(path):
            raise PermissionDeniedError(
                ErrorReason.ERROR_REASON_PATH_NOT_ALLOWED,
                f'"{self._shown(asked or path)}" lies outside the folders that this server may read ({self}). '
                "Move it there, or ask the operator to add --model-root.",
            )

    def _shown(self, path: Path) -> Path:
        """Without the name of a folder that is not to be told."""
        untold = [root for root in self._roots if root not in self._told and path.is_relative_to(root)]
        return path.relative_to(untold[0]) if untold else path

    def check_inside(self, folder: Path) -> None:
        """Checks everything in a folder that others will read by its name.

        Raises:
            PermissionDeniedError: A link in it leads out of the roots, it holds a pipe, a socket or a device, or more
                entries than any model or dataset.
        """
        entries = list(islice(_entries(folder), MOST_ENTRIES + 1))
        if len(entries) > MOST_ENTRIES:
            raise _refused(
                f'"{folder}" holds more than {MOST_ENTRIES} files', "Name the folder of one model or dataset."
            )
        for entry in entries:
            if entry.is_symlink():
                self.check(entry)
            if not is_file_or_folder(entry) and entry.exists():
                raise _refused(f'"{entry}" is neither a file nor a folder', "Remove it.")

    def require(self, name: str, reason: "ErrorReason.ValueType", what: str) -> Path:
        """As `find`, but nothing there is a NotFoundError with the given reason."""
        path = self.find(name)
        if path is None:
            raise NotFoundError(
                reason,
                f'No {what} "{name}" on the server. Relative paths are looked up below {self}; check the spelling.',
            )
        return path


def real_path(path: Path) -> Path | None:
    """The path with every link followed; None for one that cannot be: links in a circle, a zero byte."""
    try:
        return path.resolve()
    except (OSError, RuntimeError, ValueError):
        return None


def is_file_or_folder(path: Path) -> bool:
    """True for a regular file or a folder, links followed; a name that is too long for one is nothing."""
    try:
        return path.is_file() or path.is_dir()
    except OSError:
        return False


def has_content(folder: Path) -> bool:
    """True when something is there that results must not be written over: a file, or a folder with anything in it."""
    return folder.exists() and (not folder.is_dir() or any(folder.iterdir()))


def _entries(folder: Path) -> Iterator[Path]:
    """Everything below a folder, also below folders that links in it lead to; each folder once."""
    waiting, seen = [folder], {folder}
    while waiting:
        for entry in sorted(waiting.pop().iterdir()):
            yield entry
            real = real_path(entry)
            if real is not None and real not in seen and real.is_dir():
                seen.add(real)
                waiting.append(entry)


def _refused(what: str, then: str) -> PermissionDeniedError:
    return PermissionDeniedError(ErrorReason.ERROR_REASON_PATH_NOT_ALLOWED, f"{what}, so it is not read. {then}")
