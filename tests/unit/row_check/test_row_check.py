"""What counts as a row: every bad input, by the process that decides, and the same rows in the engine."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pytest
from pyarrow import parquet

from support.uploads import FORMATS, as_arrow, as_csv, as_jsonl, as_parquet
from support.waiting import wait_until
from unslothd.v1.dataset_pb2 import DataFormat, DatasetSource
from unslothd_server.engine.rows import open_rows
from unslothd_server.errors import DatasetError
from unslothd_server.row_check.__main__ import MAX_MEMORY_BYTES
from unslothd_server.row_check.verdict import MAX_ROW_BYTES, Verdict

ROWS = [{"prompt": f"q {number}", "completion": f"a ✓ {number}"} for number in range(2500)]
NAMES = {
    DataFormat.DATA_FORMAT_JSONL: "jsonl",
    DataFormat.DATA_FORMAT_CSV: "csv",
    DataFormat.DATA_FORMAT_ARROW_STREAM: "arrow",
    DataFormat.DATA_FORMAT_PARQUET: "parquet",
}


ENVIRONMENT = {"PYTHONPATH": os.pathsep.join(sys.path)}


def command(data_format: str, path: Path) -> list[str]:
    return [sys.executable, "-m", "unslothd_server.row_check", data_format, str(path)]


def run(data_format: str, path: Path, news: bytes) -> "subprocess.CompletedProcess[bytes]":
    check = command(data_format, path)
    return subprocess.run(check, input=news, capture_output=True, env=ENVIRONMENT, timeout=60, check=False)


def checked(data: bytes, data_format: str, folder: Path) -> Verdict:
    """The verdict on data that grew in three steps."""
    path = folder / f"rows.{data_format}"
    path.write_bytes(data)
    news = b"%d\n%d\n%d\nend\n" % (len(data) // 3, len(data) // 2, len(data))
    done = run(data_format, path, news)
    assert done.returncode == 0, done.stderr.decode()
    return Verdict.from_line(done.stdout)


def bad_rows(verdict: Verdict) -> dict[int, str]:
    assert verdict.outcome == "bad_rows"
    return {row.number: row.cause for row in verdict.bad_rows}


@pytest.mark.parametrize("data_format", FORMATS)
def test_good_rows_are_counted_and_their_columns_named(data_format: DataFormat.ValueType, tmp_path: Path):
    verdict = checked(FORMATS[data_format](ROWS), NAMES[data_format], tmp_path)
    assert verdict == Verdict("good", 2500, ["prompt", "completion"])
    source = DatasetSource(path=str(tmp_path / f"rows.{NAMES[data_format]}"))
    assert list(open_rows(source).rows) == ROWS  # and the engine reads what was checked


# Each is one dataset: what is right for the check is right for the engine, and the other way round.
TEXTS: dict[str, tuple[str, bytes, list[int]]] = {
    "empty lines": ("jsonl", b'\n{"a": 1}\n\r\n   \n{"a": 2}', []),
    "no newline at the end": ("jsonl", b'{"a": 1}\n{"a": 2}', []),
    "a byte order mark": ("jsonl", b'\xef\xbb\xbf{"a": 1}\n', []),
    "not a number": ("jsonl", b'{"a": NaN}\n', []),
    "a line cut off": ("jsonl", b'{"a": 1}\n{"a": ', [2]),
    "no object": ("jsonl", b'{"a": 1}\n\n[1]\n"text"\n{"a": 2}\n', [2, 3]),
    "no UTF-8": ("jsonl", b'{"a": "\xff"}\n{"a": 1}\n', [1]),
    "two objects in a line": ("jsonl", b'{"a": 1} {"a": 2}\n', [1]),
    "a CSV with quotes and line breaks": ("csv", b'a,b\r\n"x\r\ny","""z"""\r\n\r\n1,2\r\n', []),
    "a CSV with a byte order mark": ("csv", b"\xef\xbb\xbfa,b\n1,2\n", []),
    "a CSV with carriage returns alone": ("csv", b"a,b\r1,2\r3,4\r", []),
    "a CSV with too few and too many fields": ("csv", b"a,b\n1\n1,2\n1,2,3\n", [1, 3]),
    "a CSV with an open quote": ("csv", b'a,b\n"1,2\n3,4\n', [1]),
}


@pytest.mark.parametrize("name", TEXTS)
def test_the_check_and_the_engine_agree_on_what_a_row_is(name: str, tmp_path: Path):
    suffix, data, bad = TEXTS[name]
    verdict = checked(data, suffix, tmp_path)
    source = DatasetSource(path=str(tmp_path / f"rows.{suffix}"))
    if not bad:
        rows = list(open_rows(source).rows)
        assert (verdict.outcome, verdict.num_rows) == ("good", len(rows))
        assert verdict.columns == list(rows[0])
    else:
        assert list(bad_rows(verdict)) == bad
        with pytest.raises(DatasetError) as caught:
            list(open_rows(source).rows)
        assert caught.value.metadata["row"] == str(bad[0])


def test_a_row_of_a_csv_that_is_not_utf_8_is_named_and_the_next_ones_are_checked(tmp_path: Path):
    verdict = checked(b"a,b\n1,2\n\xe4,2\n3,4\n5\n", "csv", tmp_path)
    assert list(bad_rows(verdict)) == [2, 4]
    assert "UTF-8" in bad_rows(verdict)[2]


def test_the_first_20_bad_rows_are_named_and_the_check_ends_there(tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"no\n" * 21)
    done = run("jsonl", path, b"%d\n" % (21 * 3))  # no end: it does not wait for one
    assert list(bad_rows(Verdict.from_line(done.stdout))) == list(range(1, 21))


@pytest.mark.parametrize(
    "line",
    [b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", b'{"a": ' + b"9" * 5000 + b"}"],
    ids=["nested", "a number of 5000 digits"],
)
def test_a_line_that_breaks_parsers_is_one_bad_row(line: bytes, tmp_path: Path):
    verdict = checked(b'{"a": 1}\n' + line + b'\n{"a": 2}\n', "jsonl", tmp_path)
    assert (list(bad_rows(verdict)), verdict.num_rows) == ([2], 3)


def test_a_line_of_more_than_64_mib_is_one_bad_row(tmp_path: Path):
    verdict = checked(b'{"a": "' + b"x" * MAX_ROW_BYTES + b'"}\n{"a": 2}\n{\n', "jsonl", tmp_path)
    assert list(bad_rows(verdict)) == [1, 3]
    assert "64 MiB" in bad_rows(verdict)[1]


def test_a_field_of_a_csv_of_more_than_64_mib_is_a_bad_row(tmp_path: Path):
    verdict = checked(b'a\n1\n"' + b"x" * 1000 * 70_000, "csv", tmp_path)
    assert list(bad_rows(verdict)) == [2]


@pytest.mark.parametrize("data_format", ["jsonl", "csv", "arrow", "parquet"])
def test_no_bytes_are_empty(data_format: str, tmp_path: Path):
    assert checked(b"", data_format, tmp_path).outcome == "empty"


EMPTY = {
    "lines of nothing": ("jsonl", b"\n \n"),
    "rows without a column": ("jsonl", b"{}\n{}\n"),
    "a header alone": ("csv", b"a,b\n"),
}


@pytest.mark.parametrize("name", EMPTY)
def test_text_without_rows_is_empty(name: str, tmp_path: Path):
    data_format, data = EMPTY[name]
    assert checked(data, data_format, tmp_path).outcome == "empty"


def test_tables_without_rows_are_empty(tmp_path: Path):
    table, sink = pa.table({"a": pa.array([], pa.string())}), pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    assert checked(sink.getvalue().to_pybytes(), "arrow", tmp_path).outcome == "empty"
    sink = pa.BufferOutputStream()
    parquet.write_table(table, sink)
    assert checked(sink.getvalue().to_pybytes(), "parquet", tmp_path).outcome == "empty"


def _overwritten(data: bytes, start: int) -> bytes:
    return data[:start] + b"\xff" * 200 + data[start + 200 :]


DAMAGED: dict[str, tuple[str, bytes, str]] = {
    "half a Parquet file": ("parquet", as_parquet(ROWS)[:5000], "cut off"),
    "a Parquet file with a broken page": (
        "parquet",
        _overwritten(as_parquet(ROWS, compression="none"), 40),
        "Row group 0",
    ),
    "a Parquet file with a broken footer": ("parquet", _overwritten(as_parquet(ROWS), -700), "footer"),
    "a few bytes called Parquet": ("parquet", b"PA", "no Parquet file"),
    "half an Arrow stream": ("arrow", as_arrow(ROWS)[:-20_000], "cut off after"),
    "an Arrow stream cut in its schema": ("arrow", as_arrow(ROWS)[:50], "no Arrow IPC stream"),
    "two Arrow streams": ("arrow", as_arrow(ROWS) * 2, "bytes follow the end"),
    "JSONL called Arrow": ("arrow", as_jsonl(ROWS), "no Arrow IPC stream"),
    "Arrow called JSONL": ("jsonl", as_arrow(ROWS), "an Arrow IPC stream"),
    "Parquet called CSV": ("csv", as_parquet(ROWS), "a Parquet file"),
    "gzip called JSONL": ("jsonl", b"\x1f\x8b\x08\x00rest", "compressed"),
    "too many columns": ("csv", ",".join(map(str, range(1001))).encode(), "more than 1000 columns"),
    "a column with a long name": ("jsonl", json.dumps({"x" * 300: 1}).encode(), "300 characters"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_data_is_told_with_what_is_wrong(name: str, tmp_path: Path):
    data_format, data, word = DAMAGED[name]
    verdict = checked(data, data_format, tmp_path)
    assert verdict.outcome == "damaged"
    assert word in verdict.cause


def test_an_arrow_file_is_told_from_a_stream(tmp_path: Path):
    sink = pa.BufferOutputStream()
    table = pa.Table.from_pylist(ROWS)
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    verdict = checked(sink.getvalue().to_pybytes(), "arrow", tmp_path)
    assert "not an Arrow IPC stream" in verdict.cause


def test_text_of_a_table_that_is_no_utf_8_is_damage(tmp_path: Path):
    column = pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\2\0\0\0"), pa.py_buffer(b"\xff\xfe")])
    table, sink = pa.table({"text": column}), pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    assert "damaged" in checked(sink.getvalue().to_pybytes(), "arrow", tmp_path).cause


def test_the_process_writes_no_file_and_no_core_and_takes_bounded_memory_and_files(tmp_path: Path):
    bounds = {
        psutil.RLIMIT_DATA: MAX_MEMORY_BYTES,
        psutil.RLIMIT_NOFILE: 64,
        psutil.RLIMIT_FSIZE: 0,
        psutil.RLIMIT_CORE: 0,
    }
    (tmp_path / "rows").touch()
    with subprocess.Popen(command("jsonl", tmp_path / "rows"), stdin=subprocess.PIPE, env=ENVIRONMENT) as process:
        try:
            looked_at = psutil.Process(process.pid)
            wait_until(lambda: all(looked_at.rlimit(what) == (most, most) for what, most in bounds.items()))
        finally:
            process.kill()


def test_an_upload_that_is_given_up_ends_the_process_without_a_verdict(tmp_path: Path):
    (tmp_path / "rows").write_bytes(b'{"a": 1}\n')
    done = run("jsonl", tmp_path / "rows", b"9\n")
    assert (done.returncode, done.stdout) == (0, b"")


def test_a_table_of_30_mib_in_one_batch_is_mapped_and_not_read_into_memory(tmp_path: Path):
    rows: list[dict[str, Any]] = [{"text": "x" * 1_000_000} for _ in range(30)]
    assert checked(as_arrow(rows), "arrow", tmp_path).num_rows == 30


def test_csv_columns_stand_in_the_order_of_the_header(tmp_path: Path):
    assert checked(as_csv([{"b": "1", "a": "2"}]), "csv", tmp_path).columns == ["b", "a"]
