"""What an upload sends: a file as it is, a table as an Arrow stream, other rows as JSONL, in blocks of at most 1 MiB.

Blocks are made anew each time: once for their SHA-256, so that bytes which the server has are not sent, then to send
them, then again after a lost connection. Nothing here imports pyarrow but for data that is a table.
"""

import tempfile
from collections.abc import Callable, Iterable, Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias, cast

from unslothd import errors
from unslothd._rows import MAX_INLINE_BYTES, encoded_rows, rows_of
from unslothd.v1 import dataset_pb2

BLOCK_BYTES = 1024 * 1024  # the largest chunk of the contract
# What the server validates at a time; small enough to keep both sides at work.
_BATCH_BYTES = 4 * BLOCK_BYTES
# Parts below this are joined: a message for each would cost more than the copy.
_SMALL_BYTES = 64 * 1024
_DATASET_ROWS = 1000

Block: TypeAlias = "bytes | bytearray | memoryview[int]"
FormatName: TypeAlias = Literal["jsonl", "csv", "parquet", "arrow"]
DataFormat: TypeAlias = "dataset_pb2.DataFormat.ValueType"

FORMATS: dict[str, DataFormat] = {
    "jsonl": dataset_pb2.DATA_FORMAT_JSONL,
    "csv": dataset_pb2.DATA_FORMAT_CSV,
    "parquet": dataset_pb2.DATA_FORMAT_PARQUET,
    "arrow": dataset_pb2.DATA_FORMAT_ARROW_STREAM,
}


class UploadSource(Protocol):
    """Bytes of one format that can be read any number of times."""

    @property
    def data_format(self) -> DataFormat:
        """Encoding of the bytes."""
        ...

    def blocks(self) -> Iterator[Block]:
        """Yields all bytes from the first, at most 1 MiB at a time. Raises OSError or InvalidRequest."""
        ...


class FileSource:
    """A local file, as it is.

    Args:
        path: The file.
        data_format: What it holds.
    """

    def __init__(self, path: Path, data_format: DataFormat) -> None:
        self._path = path
        self.data_format = data_format

    def blocks(self) -> Iterator[bytes]:
        """Yields its bytes."""
        with self._path.open("rb", buffering=0) as file:
            while block := file.read(BLOCK_BYTES):
                yield block


class ArrowSource:
    """A table, as an Arrow stream whose blocks are views of the table's own memory.

    Args:
        batches: Makes its record batches, the same each time.
    """

    data_format = dataset_pb2.DATA_FORMAT_ARROW_STREAM

    def __init__(self, batches: Callable[[], Iterable[Any]]) -> None:
        self._batches = batches

    def blocks(self) -> Iterator[Block]:
        """Yields the stream."""
        return arrow_blocks(self._batches())


class SpooledSource:
    """Rows that can be had only once, written to a temporary file (a small set stays in memory).

    Args:
        blocks: All bytes.
        data_format: Their encoding.
    """

    def __init__(self, blocks: Iterable[Block], data_format: DataFormat) -> None:
        self.data_format = data_format
        self._file = tempfile.SpooledTemporaryFile(max_size=MAX_INLINE_BYTES)  # noqa: SIM115 - it lives as long as this
        for block in blocks:
            self._file.write(block)
        self.num_bytes = self._file.tell()

    def blocks(self) -> Iterator[bytes]:
        """Yields the bytes."""
        self._file.seek(0)
        while block := self._file.read(BLOCK_BYTES):
            yield block


def rows_source(data: object) -> UploadSource:
    """Returns what to send of a table or an iterable of rows.

    Raises:
        InvalidRequest: A row that JSON does not have.
        TypeError: Not a table and not rows.
    """
    return _table_source(data) or SpooledSource(encoded_rows(rows_of(data)), dataset_pb2.DATA_FORMAT_JSONL)


def _table_source(data: Any) -> UploadSource | None:
    """Returns the source of a table; None when it is none, or when it can be sent as rows only."""
    if all(hasattr(data, name) for name in ("with_format", "iter", "num_rows")):  # a datasets.Dataset
        formatted = data.with_format("arrow")  # rows that were filtered or shuffled come in their order
        return ArrowSource(lambda: _batches(formatted.iter(batch_size=_DATASET_ROWS)))
    if find_spec("pyarrow") is None:
        return None
    if hasattr(data, "read_next_batch"):  # a pyarrow.RecordBatchReader can be read once
        return SpooledSource(arrow_blocks(cast(Iterable[Any], data)), dataset_pb2.DATA_FORMAT_ARROW_STREAM)
    table = _table(data)
    if table is None:
        return None
    rows = max(1, table.num_rows * _BATCH_BYTES // max(1, table.nbytes))
    return ArrowSource(lambda: table.to_batches(max_chunksize=rows))


def _table(data: Any) -> Any:
    if hasattr(data, "to_batches") and hasattr(data, "schema"):
        return data
    pyarrow: Any = import_module("pyarrow") if hasattr(data, "__arrow_c_stream__") else None
    if pyarrow is None:
        return None
    try:
        if hasattr(data, "iloc"):  # a pandas.DataFrame; its index is no column
            return pyarrow.Table.from_pandas(data, preserve_index=False)
        return pyarrow.table(data)
    except pyarrow.ArrowException:  # columns of mixed types, which JSON has
        return None


def _batches(tables: Iterable[Any]) -> Iterator[Any]:
    for table in tables:
        yield from table.combine_chunks().to_batches()  # shuffled rows come as many tables of one row


def arrow_blocks(batches: Iterable[Any]) -> Iterator[Block]:
    """Yields record batches as an Arrow stream; large buffers are not copied.

    Raises:
        InvalidRequest: There is no batch.
    """
    return _repacked(_arrow_parts(batches))


def _arrow_parts(batches: Iterable[Any]) -> Iterator[Any]:
    rest = iter(batches)
    first = next(rest, None)
    if first is None:
        raise errors.InvalidRequest("the dataset has no rows: pass at least one", reason="DATASET_EMPTY")
    pyarrow: Any = import_module("pyarrow")
    sink = _Sink()
    with pyarrow.ipc.new_stream(pyarrow.PythonFile(sink, mode="w"), first.schema) as writer:
        writer.write_batch(first)
        yield from sink.take()
        for batch in rest:
            writer.write_batch(batch)
            yield from sink.take()
    yield from sink.take()


class _Sink:
    """A file for pyarrow that keeps what is written as the buffers that it got."""

    closed = False

    def __init__(self) -> None:
        self._parts: list[Any] = []

    def write(self, part: Any) -> None:
        self._parts.append(part)

    def flush(self) -> None:
        """Has nothing to do."""

    def take(self) -> list[Any]:
        """Returns what was written since the last call."""
        parts, self._parts = self._parts, []
        return parts


def _repacked(parts: Iterable[Any]) -> Iterator[Block]:
    """Yields blocks of at most 1 MiB: small parts joined, large ones as views."""
    waiting = bytearray()
    for part in parts:
        view = memoryview(part).cast("B")
        if len(view) < _SMALL_BYTES:
            waiting += view
        if waiting and (len(view) >= _SMALL_BYTES or len(waiting) + _SMALL_BYTES > BLOCK_BYTES):
            yield waiting
            waiting = bytearray()
        if len(view) >= _SMALL_BYTES:
            yield from (view[start : start + BLOCK_BYTES] for start in range(0, len(view), BLOCK_BYTES))
    if waiting:
        yield waiting
