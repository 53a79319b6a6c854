"""Checks tables: Arrow streams as they arrive, Parquet files once they are whole."""

import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from unslothd_server.row_check.growing_file import GrowingFile
from unslothd_server.row_check.verdict import Verdict, check_columns, damaged, good_or_empty, shortened

# As many rows at a time as `engine/rows.py` reads later: what fits here fits there.
_BATCH_ROWS = 1024
_PARQUET_MAGIC = b"PAR1"
_ARROW_FILE_MAGIC = b"ARROW1"
_WRITE_AGAIN = "Write it again and upload that."


def _without_numpy(module: str) -> Any:
    """Imports a part of pyarrow, which needs no numpy here; importing that takes longer than checking 50 MB."""
    sys.modules["numpy"] = None  # pyright: ignore[reportArgumentType] - the language's way to say that it is not there
    return import_module(module)


def check_arrow_stream(file: GrowingFile) -> Verdict:
    """A schema, then record batches, each validated in full as soon as it is there.

    Raises:
        RowsRefusedError: The stream is damaged, or is none.
    """
    pyarrow = _without_numpy("pyarrow")
    head = file.peek(len(_ARROW_FILE_MAGIC))
    if head == _ARROW_FILE_MAGIC:
        raise damaged(
            "This is an Arrow IPC file, not an Arrow IPC stream. Read it with pyarrow.ipc.open_file(path).read_all() "
            "and upload that table."
        )
    num_rows = num_batches = 0
    try:
        reader = pyarrow.ipc.open_stream(pyarrow.PythonFile(file, mode="r"))
    except Exception as error:
        raise damaged(f"This is no Arrow IPC stream ({shortened(error)}). {_WRITE_AGAIN}") from error
    names = [str(name) for name in reader.schema.names]
    check_columns(names)
    try:
        for batch in reader:
            batch.validate(full=True)
            num_batches += 1
            num_rows += batch.num_rows
    except Exception as error:
        where = f"after {num_batches} whole batches ({num_rows} rows)"
        raise damaged(f"The Arrow stream is damaged or cut off {where}: {shortened(error)}. {_WRITE_AGAIN}") from error
    left = file.wait_for_end() - file.tell()
    if left:
        raise damaged(
            f"{left} bytes follow the end of the Arrow stream; two streams that were joined are not one. Write all "
            "rows into one stream and upload that."
        )
    return good_or_empty(num_rows, names)


def check_parquet(file: GrowingFile, path: Path) -> Verdict:
    """The footer, then every row group, decoded in full.

    Raises:
        RowsRefusedError: The file is damaged, or is none.
    """
    parquet = _without_numpy("pyarrow.parquet")
    file.wait_for_end()
    _check_magic(path)
    try:
        opened = parquet.ParquetFile(path, memory_map=True, pre_buffer=False, page_checksum_verification=True)
        names, expected = list(opened.schema_arrow.names), opened.metadata.num_rows
    except Exception as error:
        raise damaged(f"The footer of the Parquet file is damaged: {shortened(error)}. {_WRITE_AGAIN}") from error
    check_columns(names)
    num_rows = 0
    for group in range(opened.num_row_groups):
        try:
            num_rows += sum(_valid_rows(opened, group))
        except Exception as error:
            raise damaged(
                f"Row group {group} of the Parquet file, its rows from {num_rows + 1} on, cannot be read: "
                f"{shortened(error)}. {_WRITE_AGAIN}"
            ) from error
    if num_rows != expected:
        raise damaged(f"The Parquet file has {num_rows} rows, but its footer says {expected}. {_WRITE_AGAIN}")
    return good_or_empty(num_rows, names)


def _check_magic(path: Path) -> None:
    with path.open("rb") as file:
        begins = file.read(len(_PARQUET_MAGIC)) == _PARQUET_MAGIC
        file.seek(-min(len(_PARQUET_MAGIC), path.stat().st_size), 2)
        ends = file.read() == _PARQUET_MAGIC
    if not begins:
        raise damaged("This is no Parquet file: it does not begin as one. Check the format, or write it again.")
    if not ends:
        raise damaged(
            "The Parquet file is cut off: its footer, which stands at the end, is missing. Copy or write it again in "
            "full and upload that."
        )


def _valid_rows(opened: Any, group: int) -> Iterator[int]:
    for batch in opened.iter_batches(batch_size=_BATCH_ROWS, row_groups=[group], use_threads=False):
        batch.validate(full=True)
        yield batch.num_rows
