"""Rows out of files, and the errors that name a bad one."""

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from unslothd.v1.dataset_pb2 import DatasetSource
from unslothd_server.engine.rows import open_rows
from unslothd_server.errors import DatasetError, NotFoundError

ROWS = [{"text": "one", "n": 1}, {"text": "two, with a comma", "n": 2}, {"text": "drei\nZeilen ü", "n": 3}]


def write(folder: Path, kind: str) -> Path:
    path = folder / f"rows{kind}"
    match kind:
        case ".jsonl":
            path.write_text("\n\n".join(json.dumps(row) for row in ROWS) + "\n", encoding="utf-8")
        case ".json":
            path.write_text(json.dumps(ROWS), encoding="utf-8")
        case ".csv":
            lines = ["text,n", "one,1", '"two, with a comma",2', '"drei\nZeilen ü",3']
            path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        case ".parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
        case ".arrow":
            table = pyarrow.Table.from_pylist(ROWS)
            with pyarrow.ipc.new_stream(path, table.schema) as writer:
                writer.write_table(table)
    return path


@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv", ".parquet", ".arrow"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, kind: str) -> None:
    opened = open_rows(DatasetSource(path=str(write(tmp_path, kind))))
    assert opened.columns == ["text", "n"]
    rows = list(opened.rows)
    assert [row["text"] for row in rows] == [row["text"] for row in ROWS]
    assert [int(row["n"]) for row in rows] == [1, 2, 3]


def test_the_limit_takes_the_first_rows(tmp_path: Path) -> None:
    opened = open_rows(DatasetSource(path=str(write(tmp_path, ".jsonl")), limit=2))
    assert [row["n"] for row in opened.rows] == [1, 2]


def test_rows_beyond_the_limit_are_not_even_parsed(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "good"}\nnot json\n', encoding="utf-8")
    assert [row["text"] for row in open_rows(DatasetSource(path=str(path), limit=1)).rows] == ["good"]


def test_columns_are_those_of_all_first_rows_not_only_of_the_first(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"instruction": "a", "output": "b"}\n{"instruction": "a", "input": "c", "output": "b"}\n')
    assert open_rows(DatasetSource(path=str(path))).columns == ["instruction", "output", "input"]


BAD: list[tuple[str, str | bytes, str, str]] = [
    (".jsonl", '{"text": "a"}\n{"text": \n', "Row 2", "JSON"),
    (".jsonl", '{"text": "a"}\n\n["b"]\n', "Row 2", "list"),
    (".json", '[{"text": "a"}, 7]', "Row 2", "int"),
    (".csv", "text,n\na,1\nb\n", "Row 2", "1 fields"),
    (".csv", b"text,n\nGr\xfc\xdfe,1\n", "Row 1", "UTF-8"),
    (".csv", b"Gr\xfc\xdfe,n\na,1\n", "Row 1", "UTF-8"),
    (".jsonl", '{"text": "a"}\n{"n": ' + "9" * 5000 + "}\n", "Row 2", "digits"),
    (".jsonl", '{"text": "a"}\n{"n": ' + "[" * 100_000 + "\n", "Row 2", "deeply"),
    (".json", '[{"n": ' + "[" * 100_000, "Row 1", "deeply"),
    (".parquet", "not parquet", "Row 1", "Parquet"),
    (".arrow", "not arrow", "Row 1", "Arrow"),
]


@pytest.mark.parametrize(("kind", "content", "row", "cause"), BAD)
def test_a_bad_row_is_named_with_its_cause(
    tmp_path: Path, kind: str, content: str | bytes, row: str, cause: str
) -> None:
    path = tmp_path / f"rows{kind}"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(DatasetError) as raised:
        list(open_rows(DatasetSource(path=str(path))).rows)
    assert raised.value.reason_name == "DATASET_ROW"
    assert row in raised.value.message
    assert cause in raised.value.message


@pytest.mark.parametrize(("kind", "content"), [(".jsonl", "\n\n"), (".json", "[]"), (".csv", "text\n"), (".csv", "")])
def test_a_file_without_rows_is_empty(tmp_path: Path, kind: str, content: str) -> None:
    path = tmp_path / f"rows{kind}"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(DatasetError) as raised:
        open_rows(DatasetSource(path=str(path)))
    assert raised.value.reason_name == "DATASET_EMPTY"


@pytest.mark.parametrize("name", ["missing.jsonl", "rows.pickle"])
def test_a_path_that_is_no_dataset_is_not_found(tmp_path: Path, name: str) -> None:
    (tmp_path / "rows.pickle").write_bytes(b"anything")
    with pytest.raises(NotFoundError) as raised:
        open_rows(DatasetSource(path=str(tmp_path / name)))
    assert raised.value.reason_name == "DATASET_NOT_FOUND"
