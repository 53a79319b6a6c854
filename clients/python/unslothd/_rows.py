"""Turns tables and other iterables of rows into JSONL.

Tables are recognised by what they can do, so that neither pandas nor pyarrow nor datasets is ever imported here.
"""

import datetime
import decimal
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol, cast

from unslothd import errors

MAX_INLINE_BYTES = 4 * 1024 * 1024
_CHUNK_ROWS = 1000


class ArrowTable(Protocol):
    """A pyarrow.Table."""

    def to_batches(self, max_chunksize: int | None = None) -> list[Any]:
        """Splits the table into record batches."""
        ...


class DataFrame(Protocol):
    """A pandas.DataFrame."""

    iloc: Any

    def notna(self) -> Any:
        """Tells which cells hold a value."""
        ...


class RowsTooLarge(errors.InvalidRequest):
    """The rows do not fit into a request; an upload takes them."""


def encode_jsonl(rows: Iterable[object]) -> bytes:
    """Returns rows as JSONL, UTF-8.

    Raises:
        RowsTooLarge: More than 4 MiB; the rest is not read.
        InvalidRequest: A value that JSON does not have.
        TypeError: A row that is not a mapping.
    """
    result = bytearray()
    for number, line in enumerate(encoded_rows(rows), start=1):
        result += line
        if len(result) > MAX_INLINE_BYTES:
            raise too_large(f"the first {number} rows have {len(result)} bytes")
    return bytes(result)


def encoded_rows(rows: Iterable[object]) -> Iterator[bytes]:
    """Yields each row as a line of JSON, UTF-8.

    Raises:
        InvalidRequest: A value that JSON does not have.
        TypeError: A row that is not a mapping.
    """
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, Mapping):
            raise TypeError(
                f"row {number} is a {type(row).__name__}, not a dict of columns; for plain texts pass "
                '[{"text": each} for each in texts]'
            )
        columns = dict(cast(Mapping[str, Any], row))
        try:
            line = json.dumps(columns, ensure_ascii=False, allow_nan=False, default=_plain).encode()
        except (TypeError, ValueError) as error:
            text = f"row {number} cannot be sent as JSON: {error}"
            raise errors.InvalidRequest(text, reason="DATASET_ROW") from error
        yield line + b"\n"


def _plain(value: object) -> object:
    """Returns what JSON has for a value of numpy, a date or a decimal."""
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, decimal.Decimal):
        return float(value)
    for method in ("tolist", "item"):  # numpy: arrays and scalars
        convert = getattr(value, method, None)
        if callable(convert):
            return convert()
    raise TypeError(f"{type(value).__name__} has no JSON form; convert it to text or numbers first")


def rows_of(data: object) -> Iterable[object]:
    """Returns the rows of a table or an iterable."""
    name = type(data).__name__
    if isinstance(data, Mapping):
        keys = ", ".join(map(str, cast(Mapping[object, object], data)))
        raise TypeError(
            f"a {name} is not a sequence of rows (its keys: {keys}); of a DatasetDict pass one split, "
            'e.g. data["train"]; one row alone is [row]'
        )
    if hasattr(data, "notna") and hasattr(data, "iloc"):
        return _frame_rows(data)
    if hasattr(data, "to_batches") and hasattr(data, "schema"):
        return _arrow_rows(cast(ArrowTable, data))
    if isinstance(data, bytes | bytearray) or not isinstance(data, Iterable):
        raise TypeError(
            f"a {name} is not a dataset: pass a list of dicts, a datasets.Dataset, a pandas.DataFrame, "
            "a pyarrow.Table, a path, unslothd.ServerPath, unslothd.HubDataset or unslothd.UploadedDataset"
        )
    return cast(Iterable[object], data)


def _frame_rows(frame: Any) -> Iterator[Mapping[str, Any]]:
    for start in range(0, len(frame), _CHUNK_ROWS):
        part = frame.iloc[start : start + _CHUNK_ROWS]
        # Missing cells are NaN, NaT or NA, which JSON does not have.
        yield from part.astype(object).where(part.notna(), None).to_dict("records")


def _arrow_rows(table: ArrowTable) -> Iterator[Mapping[str, Any]]:
    for batch in table.to_batches(max_chunksize=_CHUNK_ROWS):
        yield from batch.to_pylist()


def too_large(what: str) -> RowsTooLarge:
    return RowsTooLarge(
        f"{what}, and a request carries at most {MAX_INLINE_BYTES} bytes (4 MiB) of rows: pass the data itself to "
        "client.train(), which uploads it, or upload it once with client.upload_dataset(data) and pass what that "
        'returns; a file on the server is unslothd.ServerPath("/path/on/the/server.jsonl")'
    )
