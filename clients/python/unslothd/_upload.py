"""The way of an upload: hash, ask whether the server has it, send it, send it again after a lost connection."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from unslothd import _flows, _operations, errors
from unslothd._retry import Retry
from unslothd._upload_sources import UploadSource
from unslothd.v1 import dataset_pb2, service_pb2


@dataclass(frozen=True)
class UploadProgress:
    """How far an upload is.

    Args:
        done: Bytes that were handed to the connection.
        total: All bytes.
    """

    done: int
    total: int


OnProgress = Callable[[UploadProgress], None]


class _Requests:
    """The messages of one attempt, made while they are sent, which is in another thread.

    After an error while they are made comes a message without content: the server refuses it and keeps nothing, and
    the flow raises `failure` in place of that.
    """

    def __init__(
        self, header: service_pb2.UploadDatasetHeader, source: UploadSource, total: int, on_progress: OnProgress | None
    ) -> None:
        self._header = header
        self._source = source
        self._total = total
        self._on_progress = on_progress
        self.failure: Exception | None = None

    def __iter__(self) -> Iterator[service_pb2.UploadDatasetRequest]:
        yield service_pb2.UploadDatasetRequest(header=self._header)
        try:
            yield from self._chunks()
        except Exception as error:  # noqa: BLE001 - whatever it is, it is raised where the user waits
            self.failure = error
            yield service_pb2.UploadDatasetRequest()

    def _chunks(self) -> Iterator[service_pb2.UploadDatasetRequest]:
        done = 0
        for block in self._source.blocks():
            yield service_pb2.UploadDatasetRequest(chunk=bytes(block))
            done += len(block)
            if self._on_progress is not None:
                self._on_progress(UploadProgress(done, self._total))


def upload(
    source: UploadSource, name: str, timeout: float | None, retry: Retry, on_progress: OnProgress | None
) -> _operations.Flow[None, dataset_pb2.Dataset]:
    """Stores what a source has and returns the dataset; what the server has already is not sent."""
    sha256, total = yield _operations.Blocking(lambda: _measured(source))
    known = yield from _find(f"sha256:{sha256}", timeout, retry)
    if known is not None and known.format == source.data_format:
        return known
    header = service_pb2.UploadDatasetHeader(name=name, format=source.data_format, sha256=sha256)
    while True:
        requests = _Requests(header, source, total, on_progress)
        try:
            response = yield _operations.SendStream("UploadDataset", requests)
        except errors.UnslothdError as error:
            if requests.failure is not None:
                raise requests.failure from None
            if not _flows.connection_lost(error):
                raise
            yield _operations.Sleep(retry.next_delay(error))
        else:
            retry.heard()
            return response.dataset


def _measured(source: UploadSource) -> tuple[str, int]:
    """Returns the SHA-256 of all bytes, and their number."""
    digest, total = hashlib.sha256(), 0
    for block in source.blocks():
        digest.update(block)
        total += len(block)
    return digest.hexdigest(), total


def _find(dataset_id: str, timeout: float | None, retry: Retry) -> _operations.Flow[None, dataset_pb2.Dataset | None]:
    try:
        request = service_pb2.GetDatasetRequest(dataset_id=dataset_id)
        response = yield from _flows.unary("GetDataset", request, timeout, retry)
    except errors.NotFound:
        return None
    return response.dataset
