"""Downloads: the files of an artifact or a checkpoint, in the order of their names, chunk by chunk from the disk."""

import asyncio
import hashlib
import json
import os
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

from unslothd.v1.artifact_pb2 import ArtifactFile
from unslothd.v1.error_reason_pb2 import ErrorReason
from unslothd.v1.service_pb2 import DownloadArtifactRequest, DownloadArtifactResponse
from unslothd_server.app.artifacts import Artifacts
from unslothd_server.app.files import open_inside
from unslothd_server.errors import NotFoundError, OutOfRangeError
from unslothd_server.export_folder import regular_files

CHUNK_BYTES = 1 << 20
_SUMS_KEPT = 1000
# What the engine writes beside the files of a checkpoint and of a result, with their sizes and sums.
_LISTS = ("manifest.json", "receipt.json")


@dataclass(frozen=True)
class Folder:
    """Files that can be downloaded.

    Args:
        title: For people, e.g. 'artifact "artifact-…"'.
        path: Absolute folder.
        files: By name, in that order; sha256 is empty where nobody has worked it out yet.
    """

    title: str
    path: Path
    files: dict[str, ArtifactFile]


class Downloads:
    """Sends files.

    Args:
        artifacts: Exported artifacts.
        output_root: Nothing outside it is sent.
        result_of: Returns the folder of a training's result (step 0) or checkpoint; raises NotFoundError.
    """

    def __init__(self, artifacts: Artifacts, output_root: Path, result_of: Callable[[str, int], Path]) -> None:
        self._artifacts = artifacts
        self._root = output_root
        self._result_of = result_of
        self._sums = SumCache()

    async def download(self, request: DownloadArtifactRequest) -> AsyncIterator[DownloadArtifactResponse]:
        """Yields each file's header, then (unless only headers are wanted) its bytes in chunks of at most 1 MiB.

        Raises:
            NotFoundError: The artifact, the checkpoint or one of the names; or a file that changes while it is sent.
            OutOfRangeError: The offset is beyond the first file.
        """
        folder = await asyncio.to_thread(self._folder, request)
        files = _chosen(folder, list(request.names))
        offset = request.offset
        _check_offset(files, offset)
        for file in files:
            async for response in self._send(folder, file, offset):
                yield response
                if request.headers_only:
                    break
            offset = 0

    def _folder(self, request: DownloadArtifactRequest) -> Folder:
        if request.WhichOneof("source") == "artifact_id":
            artifact = self._artifacts.get(request.artifact_id)
            files = {file.name: file for file in sorted(artifact.files, key=lambda file: file.name)}
            return Folder(f'artifact "{artifact.artifact_id}"', Path(artifact.path), files)
        checkpoint = request.checkpoint
        path = self._result_of(checkpoint.training_id, checkpoint.step)
        title = f'{path.name} of training "{checkpoint.training_id}"'
        if not path.is_dir() or not path.resolve().is_relative_to(self._root.resolve()):
            raise NotFoundError(
                ErrorReason.ERROR_REASON_CHECKPOINT_NOT_FOUND,
                f"The files of {title} are gone. GetTraining shows the checkpoints that are left.",
            )
        return Folder(title, path, _checkpoint_files(path))

    async def _send(self, folder: Folder, file: ArtifactFile, offset: int) -> AsyncIterator[DownloadArtifactResponse]:
        stream = await asyncio.to_thread(_open, folder, file, self._root)
        try:
            header = ArtifactFile(name=file.name, num_bytes=file.num_bytes, sha256=file.sha256)
            if not header.sha256:
                header.sha256 = await asyncio.to_thread(self._sums.sum_of, stream)
            yield DownloadArtifactResponse(file=header)
            await asyncio.to_thread(stream.seek, offset)
            left = file.num_bytes - offset
            while left:
                chunk = await asyncio.to_thread(stream.read, min(left, CHUNK_BYTES))
                if not chunk:
                    raise _changed(folder, file, f"it ends after {file.num_bytes - left} bytes")
                left -= len(chunk)
                yield DownloadArtifactResponse(chunk=chunk)
        finally:
            stream.close()


class SumCache:
    """SHA-256 of files that no list has, worked out once for each state of a file."""

    def __init__(self) -> None:
        self._sums: dict[tuple[int, ...], str] = {}

    def sum_of(self, stream: BufferedReader) -> str:
        """Returns 64 hexadecimal digits. Blocks while it reads."""
        status = os.fstat(stream.fileno())
        key = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
        known = self._sums.get(key)
        if known is None:
            stream.seek(0)
            known = hashlib.file_digest(stream, "sha256").hexdigest()
            if len(self._sums) >= _SUMS_KEPT:
                self._sums.clear()
            self._sums[key] = known
        return known


def _checkpoint_files(folder: Path) -> dict[str, ArtifactFile]:
    known = _listed(folder)
    files: dict[str, ArtifactFile] = {}
    for name, path in regular_files(folder).items():
        size = path.stat().st_size
        listed = known.get(name, {})
        sha256 = str(listed.get("sha256", "")) if listed.get("num_bytes") == size else ""
        files[name] = ArtifactFile(name=name, num_bytes=size, sha256=sha256)
    return files


def _listed(folder: Path) -> dict[str, dict[str, Any]]:
    """What the folder's manifest or receipt says of its files; empty without one that can be read."""
    for name in _LISTS:
        try:
            with open_inside(folder / name, folder) as stream:
                files = json.load(stream)["files"]
            return {str(key): dict(value) for key, value in files.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
    return {}


def _chosen(folder: Folder, names: list[str]) -> list[ArtifactFile]:
    unknown = sorted(set(names) - folder.files.keys())
    if unknown:
        raise NotFoundError(
            ErrorReason.ERROR_REASON_ARTIFACT_NOT_FOUND,
            f"{folder.title} has no file {', '.join(unknown)}. It has {', '.join(folder.files) or 'none'}.",
        )
    return [file for name, file in folder.files.items() if not names or name in names]


def _check_offset(files: list[ArtifactFile], offset: int) -> None:
    size = files[0].num_bytes if files else 0
    if offset > size:
        name = files[0].name if files else "an empty folder"
        raise OutOfRangeError(
            ErrorReason.ERROR_REASON_OFFSET_OUT_OF_RANGE,
            f"offset {offset} is beyond the end of {name}, which has {size} bytes. Go on from there or before.",
            metadata={"num_bytes": str(size)},
        )


def _open(folder: Folder, file: ArtifactFile, root: Path) -> BufferedReader:
    """Opens a file that is still what it was: a regular one, below the output root, of the size that was told."""
    try:
        stream = open_inside(folder.path / file.name, root)
    except OSError as error:
        raise _changed(folder, file, error.strerror or str(error)) from error
    size = os.fstat(stream.fileno()).st_size
    if size != file.num_bytes:
        stream.close()
        raise _changed(folder, file, f"it has {size} bytes instead of {file.num_bytes}")
    return stream


def _changed(folder: Folder, file: ArtifactFile, how: str) -> NotFoundError:
    return NotFoundError(
        ErrorReason.ERROR_REASON_ARTIFACT_NOT_FOUND,
        f"{file.name} of {folder.title} was deleted or changed on the server: {how}. Export it again, or download what "
        "is left by its names.",
    )
