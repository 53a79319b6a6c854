"""Which paths a request may name: only what lies below the roots that the operator allows, links followed."""

from collections.abc import Sequence
from pathlib import Path

from unslothd.v1.error_reason_pb2 import ErrorReason
from unslothd_server.errors import NotFoundError, PermissionDeniedError


class AllowedRoots:
    """Folders that requests may read from.

    Args:
        roots: Absolute folders; they need not exist yet.
    """

    def __init__(self, roots: Sequence[Path]) -> None:
        self._roots = tuple(roots)

    def __str__(self) -> str:
        return ", ".join(str(root) for root in self._roots) or "(none)"

    def contains(self, path: Path) -> bool:
        """True when the path, every link followed, lies below a root."""
        real = path.resolve()
        return any(real.is_relative_to(root.resolve()) for root in self._roots)

    def find(self, name: str) -> Path | None:
        """Returns the existing, allowed path that `name` means: absolute, or relative to the first root that has it.

        Raises:
            PermissionDeniedError: It is, or leads to, a place outside the roots (whether or not anything is there).
        """
        path = Path(name).expanduser()
        if path.is_absolute():
            self.check(path)
            return path if path.exists() else None
        for root in self._roots:
            candidate = root / path
            self.check(candidate)
            if candidate.exists():
                return candidate
        return None

    def check(self, path: Path) -> None:
        """Raises PermissionDeniedError when the path lies outside the roots."""
        if not self.contains(path):
            raise PermissionDeniedError(
                ErrorReason.ERROR_REASON_PATH_NOT_ALLOWED,
                f'"{path}" lies outside the folders that this server may read ({self}). '
                "Move it there, or ask the operator to add --model-root.",
            )

    def require(self, name: str, reason: "ErrorReason.ValueType", what: str) -> Path:
        """As `find`, but nothing there is a NotFoundError with the given reason."""
        path = self.find(name)
        if path is None:
            raise NotFoundError(
                reason,
                f'No {what} "{name}" on the server. Relative paths are looked up below {self}; check the spelling.',
            )
        return path


def has_content(folder: Path) -> bool:
    """True when something is there that results must not be written over: a file, or a folder with anything in it."""
    return folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
