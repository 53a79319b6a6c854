"""Turns what a user has (rows, tables, files, names) into the DatasetSource that a request carries."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, cast

from unslothd import _row_format, errors
from unslothd._row_format import Layout
from unslothd._rows import (
    MAX_INLINE_BYTES,
    ArrowTable,
    DataFrame,
    RowsTooLarge,
    encode_jsonl,
    encoded_rows,
    rows_of,
    too_large,
)
from unslothd._upload_sources import FORMATS, FileSource, FormatName, SpooledSource, UploadSource, rows_source
from unslothd.v1 import dataset_pb2

_HUB_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")
_FORMATS: dict[str, "dataset_pb2.DataFormat.ValueType"] = {
    ".jsonl": dataset_pb2.DATA_FORMAT_JSONL,
    ".ndjson": dataset_pb2.DATA_FORMAT_JSONL,
    ".csv": dataset_pb2.DATA_FORMAT_CSV,
    ".parquet": dataset_pb2.DATA_FORMAT_PARQUET,
    ".arrow": dataset_pb2.DATA_FORMAT_ARROW_STREAM,
}
_JSONL = dataset_pb2.DATA_FORMAT_JSONL
_SUFFIXES = (*_FORMATS, ".json")
_ARROW_FILE_MAGIC = b"ARROW1"


@dataclass(frozen=True)
class ServerPath:
    """A file or folder on the server, below one of the roots that its operator allows.

    Args:
        path: Absolute, or relative to a model root of the server.
    """

    path: str


@dataclass(frozen=True)
class HubDataset:
    """A dataset of the Hugging Face Hub, read by the server.

    Args:
        name: Repository, e.g. "HuggingFaceH4/ultrachat_200k".
        config: Configuration (subset); empty = its default.
        split: Split, slices such as "train[:10%]" included; empty = "train".
        revision: Branch, tag or commit; empty = "main".
    """

    name: str
    config: str = ""
    split: str = ""
    revision: str = ""


@dataclass(frozen=True)
class UploadedDataset:
    """A dataset that the server keeps.

    Args:
        dataset_id: "sha256:" and 64 hexadecimal digits.
    """

    dataset_id: str


DatasetIdLike: TypeAlias = dataset_pb2.Dataset | UploadedDataset | str
DatasetLike: TypeAlias = (
    str
    | Path
    | ServerPath
    | HubDataset
    | UploadedDataset
    | dataset_pb2.Dataset
    | dataset_pb2.DatasetSource
    | ArrowTable
    | DataFrame
    | Iterable[Mapping[str, Any]]
)


def dataset(
    data: DatasetLike,
    *,
    row_format: "Layout | dataset_pb2.RowFormat | None" = None,
    template: str = "",
    limit: int = 0,
) -> dataset_pb2.DatasetSource:
    """Says where rows come from, and how a row becomes what the model sees.

    Args:
        data: A list (or other iterable) of dicts, a `datasets.Dataset`, a `pandas.DataFrame` or a `pyarrow.Table`;
            a pathlib.Path or str of a local file (.jsonl, .json, .csv, .parquet, .arrow); the "org/name" of a Hub
            dataset; a ServerPath, HubDataset or UploadedDataset; what `upload_dataset` returned. Local rows travel
            inside the request: 4 MiB at most. Larger ones are passed to `train` as they are, which uploads them.
        row_format: Layout by name, or what `unslothd.row_format` returns; None = detected by the server.
        template: Text with {column} places, in place of row_format.
        limit: First N rows only; 0 = all.

    Raises:
        InvalidRequest: No such file, rows that are not JSON, no row, more than 4 MiB, or a str that could mean two
            things. The text says what to pass instead.
        TypeError: Not one of the above.
    """
    source = _source(data)
    if isinstance(row_format, dataset_pb2.RowFormat):
        if template:
            raise errors.InvalidRequest("pass row_format or template, not both")
        source.row_format.CopyFrom(row_format)
    elif row_format is not None or template:
        source.row_format.CopyFrom(_named_format(row_format, template))
    if limit:
        source.limit = limit
    return source


def place(data: DatasetLike) -> "dataset_pb2.DatasetSource | UploadSource":
    """Returns the source of data that a request can carry, or what is to be uploaded because it is too large.

    Raises:
        InvalidRequest: As `dataset`, but for the size.
        TypeError: As `dataset`.
    """
    if isinstance(data, Iterator):  # it can be read once only
        spooled = cast(SpooledSource, rows_source(data))
        if spooled.num_bytes > MAX_INLINE_BYTES:
            return spooled
        return _inline(b"".join(spooled.blocks()), spooled.data_format)
    try:
        return dataset(data)
    except RowsTooLarge:
        return upload_source(data)


def upload_source(data: DatasetLike, data_format: FormatName | None = None) -> UploadSource:
    """Returns what to send of local data.

    Args:
        data: As for `dataset`; not what is on the server or the Hub already.
        data_format: Of a file whose name does not say it.

    Raises:
        InvalidRequest: No such file, a kind of file that is not read, rows that are not JSON, or not local.
        TypeError: Not a dataset.
    """
    if isinstance(data, str | Path):
        return _file_source(Path(data).expanduser(), data_format)
    if data_format is not None:
        raise errors.InvalidRequest("format is for files only: tables are sent as Arrow, other rows as JSONL")
    if _named(data) is not None:
        raise errors.InvalidRequest("the rows are not here, so there is nothing to upload: pass this to train as it is")
    return rows_source(data)


def _file_source(path: Path, data_format: FormatName | None) -> UploadSource:
    suffix = _checked_suffix(path) if data_format is None else ""
    if suffix == ".json":
        source = _json_rows(path, path.read_bytes())
        return FileSource(path, _FORMATS[".jsonl"]) if source is None else SpooledSource(encoded_rows(source), _JSONL)
    if not path.is_file():
        raise _no_file(path)
    if suffix == ".arrow":
        with path.open("rb") as file:
            _refuse_arrow_file(path, file.read(len(_ARROW_FILE_MAGIC)))
    return FileSource(path, FORMATS[data_format] if data_format is not None else _FORMATS[suffix])


def dataset_id(data: DatasetIdLike) -> str:
    """Returns the id of a stored dataset."""
    return data if isinstance(data, str) else data.dataset_id


def _named_format(layout: Layout | None, template: str) -> dataset_pb2.RowFormat:
    return _row_format.row_format(layout, template=template)


def _source(data: object) -> dataset_pb2.DatasetSource:
    if isinstance(data, str):
        return _from_string(data)
    if isinstance(data, Path):
        return _local_file(data)
    return _named(data) or _inline(encode_jsonl(rows_of(data)), dataset_pb2.DATA_FORMAT_JSONL)


def _named(data: object) -> dataset_pb2.DatasetSource | None:
    """Returns the source of data that says itself where it is."""
    match data:
        case dataset_pb2.DatasetSource():
            copy = dataset_pb2.DatasetSource()
            copy.CopyFrom(data)
            return copy
        case ServerPath():
            return dataset_pb2.DatasetSource(path=data.path)
        case HubDataset():
            hub = dataset_pb2.HubDataset(name=data.name, config=data.config, split=data.split, revision=data.revision)
            return dataset_pb2.DatasetSource(hub=hub)
        case UploadedDataset() | dataset_pb2.Dataset():
            return dataset_pb2.DatasetSource(dataset_id=data.dataset_id)
        case _:
            return None


def _from_string(text: str) -> dataset_pb2.DatasetSource:
    path = Path(text).expanduser()
    looks_like_hub = _HUB_NAME.fullmatch(text) is not None
    if path.is_file():
        return _local_file(path)
    if path.is_dir():
        raise errors.InvalidRequest(
            f"{text!r} is a folder here: pass a file of it, unslothd.ServerPath({text!r}) for the server's, "
            f"or unslothd.HubDataset({text!r}) for the Hub's"
        )
    if looks_like_hub and path.suffix not in _SUFFIXES:
        return dataset_pb2.DatasetSource(hub=dataset_pb2.HubDataset(name=text))
    raise errors.InvalidRequest(
        f"{text!r} is no file here and no Hub name of the form org/name: correct the path, or say what it is with "
        f"unslothd.ServerPath({text!r}), unslothd.HubDataset({text!r}) or unslothd.UploadedDataset({text!r})"
    )


def _local_file(path: Path) -> dataset_pb2.DatasetSource:
    suffix = _checked_suffix(path)
    if path.stat().st_size > MAX_INLINE_BYTES and suffix != ".json":
        raise too_large(f"{path.name} has {path.stat().st_size} bytes")
    data = path.read_bytes()
    if suffix == ".json":
        rows = _json_rows(path, data)
        return _inline(data if rows is None else encode_jsonl(rows), _JSONL)
    if suffix == ".arrow":
        _refuse_arrow_file(path, data)
    return _inline(data, _FORMATS[suffix])


def _checked_suffix(path: Path) -> str:
    """Returns the suffix, which says what the file holds."""
    if not path.is_file():
        raise _no_file(path)
    suffix = path.suffix.lower()
    if suffix not in _SUFFIXES:
        raise errors.InvalidRequest(
            f"{path.name}: files of rows end in {', '.join(_SUFFIXES)}; read it yourself and pass a list of dicts"
        )
    return suffix


def _no_file(path: Path) -> errors.InvalidRequest:
    return errors.InvalidRequest(
        f"{str(path)!r} is no file here; for a file on the server pass unslothd.ServerPath({str(path)!r})"
    )


def _refuse_arrow_file(path: Path, data: bytes) -> None:
    if data.startswith(_ARROW_FILE_MAGIC):
        raise errors.InvalidRequest(
            f"{path.name} is an Arrow IPC file, not a stream: pass pyarrow.ipc.open_file(path).read_all() instead"
        )


def _json_rows(path: Path, data: bytes) -> Iterable[object] | None:
    """Returns the rows of a .json file that holds a list of them; None when it holds one row a line."""
    if not data.lstrip().startswith(b"["):
        return None
    try:
        rows: object = json.loads(data)
    except ValueError as error:
        raise errors.InvalidRequest(f"{path.name} is not JSON: {error}") from error
    return rows_of(rows)


def _inline(data: bytes, data_format: "dataset_pb2.DataFormat.ValueType") -> dataset_pb2.DatasetSource:
    if not data.strip():
        raise errors.InvalidRequest("the dataset has no rows: pass at least one", reason="DATASET_EMPTY")
    if len(data) > MAX_INLINE_BYTES:
        raise too_large(f"the rows have {len(data)} bytes")
    return dataset_pb2.DatasetSource(inline=dataset_pb2.InlineRows(format=data_format, data=data))
