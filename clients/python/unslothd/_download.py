"""Downloads files into a folder: checked, never half-written under their names, and gone on with after a break."""

import contextlib
import errno
import hashlib
import os
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from functools import partial
from io import FileIO
from pathlib import Path, PurePosixPath
from typing import Any

import grpc

from unslothd import errors
from unslothd._artifacts import DownloadSource, download_request
from unslothd._flows import Blocking, CloseStream, Emit, Flow, Next, OpenStream, Sleep, connection_lost
from unslothd._retry import Retry
from unslothd.v1 import artifact_pb2, service_pb2

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


def download(
    source: DownloadSource, names: Sequence[str], folder: Folder, retry: Retry
) -> Flow[DownloadProgress, list[Path]]:
    """Emits progress and returns the files in the order of their names.

    After a lost connection it goes on where it stopped, and nothing that is here is sent again.
    """
    transfer = _Transfer(download_request(source), folder, retry)
    if not names and isinstance(source, artifact_pb2.Artifact):
        names = [file.name for file in source.files]
    elif not names:
        names = yield from transfer.all_names()
    for name in sorted(set(names)):
        yield from transfer.take(name)
    return [transfer.done[name] for name in sorted(transfer.done)]


class _Transfer:
    """The files that have come so far, and how the next ones come."""

    def __init__(self, request: service_pb2.DownloadArtifactRequest, folder: Folder, retry: Retry) -> None:
        self.done: dict[str, Path] = {}
        self._request = request
        self._folder = folder
        self._retry = retry
        self._dropped: set[str] = set()

    def all_names(self) -> Flow[Any, list[str]]:
        """Returns the names of the files that there are."""
        request = self._copy_of_request()
        request.headers_only = True
        while True:
            names: list[str] = []
            yield OpenStream("DownloadArtifact", request)
            try:
                while (message := (yield Next())) is not None:
                    self._retry.heard()
                    if message.HasField("file"):
                        names.append(message.file.name)
            except errors.UnslothdError as error:
                if not connection_lost(error):
                    raise
                yield Sleep(self._retry.next_delay(error))
            else:
                return names

    def take(self, name: str) -> Flow[DownloadProgress, None]:
        """Takes a file, with as many streams as it needs."""
        whole = False
        while not whole:
            offset = 0
            try:
                offset = yield Blocking(partial(self._folder.part_bytes, name))
                whole = yield from self._read(name, offset)
            except errors.OutOfRange:
                if not offset:
                    raise
                yield Blocking(partial(self._folder.drop_part, name))  # that of another, longer file
            except errors.UnslothdError as error:
                if not connection_lost(error):
                    raise
                yield Sleep(self._retry.next_delay(error))

    def _copy_of_request(self) -> service_pb2.DownloadArtifactRequest:
        request = service_pb2.DownloadArtifactRequest()
        request.CopyFrom(self._request)
        return request

    def _is_done(self, file: artifact_pb2.ArtifactFile) -> bool:
        if file.name not in self.done and self._folder.holds(file):
            self.done[file.name] = self._folder.path(file.name)
        return file.name in self.done

    def _read(self, name: str, offset: int) -> Flow[DownloadProgress, bool]:
        """Takes from one stream what is not here yet; False when a file has to be taken again from its beginning."""
        request = self._copy_of_request()
        request.names.append(name)
        request.offset = offset
        yield OpenStream("DownloadArtifact", request)
        part: Part | None = None
        try:
            while (message := (yield Next())) is not None:
                self._retry.heard()
                if message.HasField("file"):
                    part = yield Blocking(partial(self._begin, message.file, offset))
                    if part is None:
                        yield Emit(DownloadProgress(message.file.name, message.file.num_bytes, message.file.num_bytes))
                        break
                elif part is not None and (yield Blocking(partial(part.receive, message.chunk))):
                    self._retry.progress()
                if part is not None:
                    yield Emit(part.progress)
                    if part.complete:
                        if not (yield Blocking(partial(self._finish, part))):
                            return False
                        part = None
        finally:
            if part is not None:
                part.close()
        yield CloseStream()
        if part is not None or name not in self.done:
            raise errors.Unavailable("the download ended before its last byte", code=grpc.StatusCode.UNAVAILABLE)
        return True

    def _begin(self, file: artifact_pb2.ArtifactFile, offset: int) -> Part | None:
        """Returns where the bytes of a file go, or None when all of it is here."""
        return None if self._is_done(file) else self._folder.open_part(file, offset)

    def _finish(self, part: Part) -> bool:
        name = part.progress.name
        path = part.finish()
        if path is not None:
            self.done[name] = path
            return True
        if name in self._dropped or not part.found_bytes:
            raise errors.UnslothdError(
                f"{name} arrived with another sha256 than the server told; the file may have changed or be damaged "
                "there. Nothing was kept of it: download it again, or export anew",
                code=grpc.StatusCode.DATA_LOSS,
            )
        self._dropped.add(name)  # what was here before belonged to another file
        return False


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
