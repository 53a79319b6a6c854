"""Where downloads go: files that are checked, never half-written under their names, and gone on with after a break."""

import contextlib
import errno
import hashlib
import os
from collections.abc import Generator
from dataclasses import dataclass
from io import FileIO
from pathlib import Path, PurePosixPath

import grpc

from unslothd import errors
from unslothd.v1 import artifact_pb2

_PART = ".part"
_BLOCK = 1024 * 1024


@dataclass(frozen=True)
class DownloadProgress:
    """How far a file has come.

    Args:
        name: Name below the folder, with "/".
        done: Bytes of it that are here.
        num_bytes: Its size.
    """

    name: str
    done: int
    num_bytes: int


class Folder:
    """Where files are downloaded to. Nothing is ever written outside of it.

    Args:
        root: Made when it does not exist.
        overwrite: Replace files of the same name and other content.
    """

    def __init__(self, root: Path, *, overwrite: bool) -> None:
        self.root = root
        self._overwrite = overwrite

    def path(self, name: str) -> Path:
        """Returns where the file of this name belongs.

        Raises:
            PermissionDenied: The name would lead out of the folder.
        """
        if not stays_inside(name):
            raise _outside(name, self.root)
        path = self.root.joinpath(*name.split("/"))
        if not path.parent.resolve().is_relative_to(self.root.resolve()):
            raise _outside(name, self.root)
        return path

    def holds(self, file: artifact_pb2.ArtifactFile) -> bool:
        """True when the whole file is here already.

        Raises:
            FileExistsError: Another file of that name is here.
        """
        path = self.path(file.name)
        if not path.exists():
            return False
        if path.stat().st_size == file.num_bytes and file_sha256(path) == file.sha256:
            return True
        if not self._overwrite:
            raise FileExistsError(
                errno.EEXIST, "another file of this name is here; take another folder or allow overwriting", str(path)
            )
        return False

    def part_bytes(self, name: str) -> int:
        """Returns how many bytes of an unfinished file are here."""
        part = _part_of(self.path(name))
        return part.stat().st_size if part.is_file() and not part.is_symlink() else 0

    def drop_part(self, name: str) -> None:
        """Forgets an unfinished file."""
        _part_of(self.path(name)).unlink(missing_ok=True)

    def open_part(self, file: artifact_pb2.ArtifactFile, position: int) -> "Part":
        """Goes on with an unfinished file, or begins it; `position` is that of the first byte that will come."""
        path = self.path(file.name)
        with _full_disk_told(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            return Part(path, file, position)


class Part:
    """A file that is being received: `<name>.part` until all of it is here and its hash is right.

    Args:
        path: Name that it gets in the end.
        file: What the server says about it.
        position: Of the next byte that is received; bytes that are here already are skipped.
    """

    def __init__(self, path: Path, file: artifact_pb2.ArtifactFile, position: int) -> None:
        self._path = path
        self._file = file
        self._position = position
        self._hash = hashlib.sha256()
        self._stream = _opened(_part_of(path))
        while block := self._stream.read(_BLOCK):
            self._hash.update(block)
        self.num_bytes = self.found_bytes = self._stream.tell()

    @property
    def complete(self) -> bool:
        """True when there is nothing left to receive."""
        return self.num_bytes >= self._file.num_bytes

    @property
    def progress(self) -> DownloadProgress:
        """How far it has come."""
        return DownloadProgress(self._file.name, self.num_bytes, self._file.num_bytes)

    def receive(self, chunk: bytes) -> bool:
        """Takes the next bytes; returns whether any of them were new."""
        new = memoryview(chunk)[max(self.num_bytes - self._position, 0) :]
        self._position += len(chunk)
        with _full_disk_told(self._path):
            written = 0
            while written < len(new):
                written += self._stream.write(new[written:]) or 0
        self._hash.update(new)
        self.num_bytes += len(new)
        return len(new) > 0

    def finish(self) -> Path | None:
        """Gives the file its name; None, and its bytes are dropped, when they are not the server's."""
        part = _part_of(self._path)
        if self.num_bytes != self._file.num_bytes or self._hash.hexdigest() != self._file.sha256:
            self.close()
            part.unlink()
            return None
        with _full_disk_told(self._path):
            os.fsync(self._stream.fileno())
            self.close()
            part.replace(self._path)
        return self._path

    def close(self) -> None:
        """Leaves what is here for the next time."""
        self._stream.close()


def stays_inside(name: str) -> bool:
    """True for a name that is a plain path below any folder, on every system."""
    parts = PurePosixPath(name).parts
    plain = bool(parts) and name == "/".join(parts) and not {"..", "/"} & set(parts)
    return plain and not any(character in name for character in "\\:\0")


def file_sha256(path: Path) -> str:
    """Returns the hash of a file as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _part_of(path: Path) -> Path:
    return path.with_name(path.name + _PART)


def _opened(part: Path) -> FileIO:
    """Opens or makes a file, never through a link."""
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
    return FileIO(os.open(part, flags, 0o666), "r+")


def _outside(name: str, root: Path) -> errors.UnslothdError:
    return errors.PermissionDenied(
        f"the server named a file {name!r}, which would not stay inside {root}; nothing was written for it",
        code=grpc.StatusCode.PERMISSION_DENIED,
    )


@contextlib.contextmanager
def _full_disk_told(path: Path) -> Generator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in {errno.ENOSPC, errno.EDQUOT}:
            raise
        raise errors.ResourceExhausted(
            f"the disk of {path} on this machine is full; free some space and download again: what is here is kept",
            code=grpc.StatusCode.RESOURCE_EXHAUSTED,
        ) from error
