"""Uploads as tests make them: rows in every format, sent over a plain stub."""

import csv
import hashlib
import io
import json
from collections.abc import Iterable, Iterator
from typing import Any

import pyarrow
from pyarrow import parquet

from support.calls import CALL_SECONDS
from unslothd.v1 import service_pb2 as pb
from unslothd.v1.dataset_pb2 import DataFormat
from unslothd.v1.service_pb2_grpc import UnslothServiceStub

Rows = list[dict[str, Any]]
CHUNK = 1024 * 1024


def as_jsonl(rows: Iterable[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def as_csv(rows: Rows) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def as_arrow(rows: Rows, *, batch_rows: int = 100) -> bytes:
    table, sink = pyarrow.Table.from_pylist(rows), pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=batch_rows)
    return sink.getvalue().to_pybytes()


def as_parquet(rows: Rows, **options: Any) -> bytes:
    sink = pyarrow.BufferOutputStream()
    parquet.write_table(pyarrow.Table.from_pylist(rows), sink, **options)
    return sink.getvalue().to_pybytes()


FORMATS = {
    DataFormat.DATA_FORMAT_JSONL: as_jsonl,
    DataFormat.DATA_FORMAT_CSV: as_csv,
    DataFormat.DATA_FORMAT_ARROW_STREAM: as_arrow,
    DataFormat.DATA_FORMAT_PARQUET: as_parquet,
}


def header(
    data_format: DataFormat.ValueType = DataFormat.DATA_FORMAT_JSONL, name: str = "", sha256: str = ""
) -> pb.UploadDatasetRequest:
    return pb.UploadDatasetRequest(header=pb.UploadDatasetHeader(name=name, format=data_format, sha256=sha256))


def chunks(data: bytes, size: int = CHUNK) -> Iterator[pb.UploadDatasetRequest]:
    for start in range(0, len(data), size):
        yield pb.UploadDatasetRequest(chunk=data[start : start + size])


def upload(
    stub: UnslothServiceStub,
    data: bytes,
    data_format: DataFormat.ValueType = DataFormat.DATA_FORMAT_JSONL,
    *,
    size: int = CHUNK,
    **fields: str,
) -> pb.UploadDatasetResponse:
    requests = [header(data_format, **fields), *chunks(data, size)]
    return stub.UploadDataset(iter(requests), timeout=CALL_SECONDS)


def id_of(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()
