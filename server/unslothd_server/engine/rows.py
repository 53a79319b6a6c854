"""Rows out of files, folders and the Hub, one dict at a time, with errors that name the row."""

import csv
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

from unslothd.v1.dataset_pb2 import DatasetSource, HubDataset
from unslothd.v1.error_reason_pb2 import ErrorReason
from unslothd_server.engine import hub
from unslothd_server.engine.durable_files import FileSum
from unslothd_server.engine.pinned_file import PinnedFile, check_in_place, open_pinned
from unslothd_server.errors import DatasetError, NotFoundError, UnslothdError

Row = dict[str, Any]

FILE_KINDS = (".jsonl", ".json", ".csv", ".parquet", ".arrow")
# Rows that are looked at for column names: JSON rows need not all have the same keys.
ROWS_FOR_COLUMNS = 100


@dataclass(frozen=True)
class RowSource:
    """Rows that are there and readable.

    Args:
        columns: Column names, in the order of the data; empty where only the rows tell them.
        rows: The rows, once; a row that cannot be read raises DATASET_ROW when its turn comes.
        file: The file that they are in; None = a folder or the Hub.
        fingerprint: What `datasets` knows a folder or a Hub dataset by; empty for a file.
    """

    columns: list[str]
    rows: Iterator[Row]
    file: PinnedFile | None = None
    fingerprint: str = ""

    def file_sum(self) -> FileSum | None:
        """Size and SHA-256 of the file as the rows came from it; None without one, or when it changed since."""
        return None if self.file is None else self.file.sum()

    def close(self) -> None:
        """Closes the file; no row can be read any more."""
        if self.file is not None:
            self.file.close()


def row_error(number: int, cause: str) -> DatasetError:
    """The error for one bad row, counted from 1."""
    return DatasetError(
        ErrorReason.ERROR_REASON_DATASET_ROW,
        f"Row {number} cannot be used: {cause}. Mend or remove it and train again.",
        metadata={"row": str(number)},
    )


def open_rows(source: DatasetSource) -> RowSource:
    """Opens the rows that a request names; `limit` is applied. Close what it returns.

    Raises:
        NotFoundError: DATASET_NOT_FOUND.
        PermissionDeniedError: What lies at the path is not what the server checked (PATH_NOT_ALLOWED).
        DatasetError: DATASET_EMPTY, or DATASET_ROW for one of the first rows.
        UnavailableError, PermissionDeniedError: The Hub.
    """
    found = _hub_rows(source.hub) if source.WhichOneof("origin") == "hub" else _path_rows(Path(source.path))
    rows = islice(found.rows, source.limit) if source.limit else found.rows
    head = list(islice(rows, ROWS_FOR_COLUMNS))
    if not head:
        raise DatasetError(
            ErrorReason.ERROR_REASON_DATASET_EMPTY, "The dataset has no rows. Give at least one row to train on."
        )
    columns = found.columns or list(dict.fromkeys(chain.from_iterable(head)))
    return replace(found, columns=columns, rows=chain(head, rows))


def _path_rows(path: Path) -> RowSource:
    if path.is_dir():
        check_in_place(path)
        return _folder_rows(path)
    try:
        file = open_pinned(path)
    except FileNotFoundError:
        raise _not_found(f"There is no file or folder {path}.") from None
    columns, rows = _file_rows(file.name, path.name)
    return RowSource(columns, _holding(file, rows), file)


def _file_rows(path: Path, name: str) -> tuple[list[str], Iterator[Row]]:
    match Path(name).suffix.lower():
        case ".jsonl":
            return [], _jsonl_rows(path)
        case ".json":
            return [], _json_rows(path)
        case ".csv":
            return _csv_rows(path)
        case ".parquet":
            return _parquet_rows(path, name)
        case ".arrow":
            return _arrow_rows(path, name)
        case _:
            raise _not_found(f"{name} is not a kind of file that is read; it must end in {', '.join(FILE_KINDS)}.")


def _holding(file: PinnedFile, rows: Iterator[Row]) -> Iterator[Row]:
    """The rows, which are read by the file's name, keep it open."""
    yield from rows
    del file


def _jsonl_rows(path: Path) -> Iterator[Row]:
    number = 0
    with path.open("rb") as file:
        for line_number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            number += 1
            try:
                row = json.loads(line)
            except RecursionError:
                raise row_error(number, f"line {line_number} nests its values too deeply") from None
            except ValueError as error:  # not JSON, not UTF-8, or a number of thousands of digits
                raise row_error(number, f"line {line_number} is not JSON ({error})") from None
            yield _checked(row, number)


def _json_rows(path: Path) -> Iterator[Row]:
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        # Many files called .json hold one object a line; of one that does not, this names the bad line.
        yield from _jsonl_rows(path)
        return
    if isinstance(content, dict):
        lists = [value for value in content.values() if isinstance(value, list)]
        content = lists[0] if len(content) == 1 and lists else [content]
    for number, row in enumerate(content if isinstance(content, list) else [content], start=1):
        yield _checked(row, number)


def _checked(row: object, number: int) -> Row:
    if not isinstance(row, dict):
        raise row_error(number, f"it is a {type(row).__name__}, but a row is an object with named columns")
    return row


def _csv_rows(path: Path) -> tuple[list[str], Iterator[Row]]:
    csv.field_size_limit(sys.maxsize)  # the default, 128 KiB, is less than one long text
    with path.open(encoding="utf-8-sig", newline="") as file:
        try:
            columns = next(csv.reader(file), [])
        except (csv.Error, UnicodeDecodeError) as error:
            raise _bad_csv(1, error) from None
    return columns, _csv_body(path, columns)


def _csv_body(path: Path, columns: list[str]) -> Iterator[Row]:
    number = 0
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file)
        next(reader, None)
        try:
            for number, fields in enumerate(filter(None, reader), start=1):
                if len(fields) != len(columns):
                    raise row_error(number, f"it has {len(fields)} fields, but the header names {len(columns)}")
                yield dict(zip(columns, fields, strict=True))
        except (csv.Error, UnicodeDecodeError) as error:
            raise _bad_csv(number + 1, error) from None


def _bad_csv(number: int, error: Exception) -> DatasetError:
    hint = "; save the file as UTF-8" if isinstance(error, UnicodeDecodeError) else ""
    return row_error(number, f"the CSV cannot be read ({error}){hint}")


def _parquet_rows(path: Path, name: str) -> tuple[list[str], Iterator[Row]]:
    import pyarrow
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise row_error(1, f"{name} is not a Parquet file ({error})") from None
    batches = file.iter_batches(batch_size=1024)
    return list(file.schema_arrow.names), (row for batch in batches for row in batch.to_pylist())


def _arrow_rows(path: Path, name: str) -> tuple[list[str], Iterator[Row]]:
    import pyarrow

    mapped = pyarrow.memory_map(str(path))
    try:
        reader = pyarrow.ipc.open_stream(mapped)
        batches: Iterator[Any] = iter(reader)
    except pyarrow.ArrowInvalid:
        try:
            reader = pyarrow.ipc.open_file(mapped)
        except pyarrow.ArrowInvalid as error:
            raise row_error(1, f"{name} is neither an Arrow stream nor an Arrow file ({error})") from None
        batches = (reader.get_batch(index) for index in range(reader.num_record_batches))
    return list(reader.schema.names), (row for batch in batches for row in _batch_rows(batch))


def _batch_rows(batch: Any) -> Iterator[Row]:
    for start in range(0, batch.num_rows, 1024):
        yield from batch.slice(start, 1024).to_pylist()


def _folder_rows(path: Path) -> RowSource:
    import datasets

    try:
        loaded = datasets.load_from_disk(str(path))
    except FileNotFoundError:
        raise _not_found(f"{path} is not a folder that datasets' save_to_disk wrote.") from None
    if isinstance(loaded, datasets.DatasetDict):
        name = "train" if "train" in loaded else next(iter(loaded))
        if name != "train" and len(loaded) > 1:
            raise _not_found(f"{path} has the splits {', '.join(loaded)}; give the path of one of them.")
        loaded = loaded[name]
    return _dataset_rows(loaded)


def _dataset_rows(loaded: Any) -> RowSource:
    return RowSource(list(loaded.column_names), iter(loaded), fingerprint=str(loaded._fingerprint))


def _hub_rows(source: HubDataset) -> RowSource:
    import datasets

    try:
        with hub.online():
            loaded = datasets.load_dataset(
                source.name,
                source.config or None,
                split=source.split or "train",
                revision=source.revision or None,
            )
    except UnslothdError:
        raise
    except Exception as error:
        raise hub.translate(error, source.name, what="dataset") from error
    return _dataset_rows(loaded)


def _not_found(what: str) -> NotFoundError:
    return NotFoundError(
        ErrorReason.ERROR_REASON_DATASET_NOT_FOUND, f"{what} Check the path of the dataset and try again."
    )
