"""Downloads files into a folder, with as many streams as the connection makes necessary."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import grpc

from unslothd import errors
from unslothd._artifacts import DownloadSource, download_request
from unslothd._download_folder import DownloadProgress, Folder, Part
from unslothd._flows import connection_lost
from unslothd._operations import Blocking, CloseStream, Emit, Flow, Next, OpenStream, Sleep
from unslothd._retry import Retry
from unslothd.v1 import artifact_pb2, service_pb2


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
