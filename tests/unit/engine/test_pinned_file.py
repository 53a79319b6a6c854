"""Rows of a file that was swapped between the server's look and the worker's: another file is never read."""

import hashlib
import json
import os
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pyarrow.csv
import pyarrow.parquet
import pytest

from unslothd.v1.dataset_pb2 import DatasetSource
from unslothd.v1.error_reason_pb2 import ErrorReason
from unslothd_server.engine import rows as rows_module
from unslothd_server.engine.durable_files import FileSum
from unslothd_server.engine.pinned_file import PinnedFile, open_pinned
from unslothd_server.engine.rows import ROWS_FOR_COLUMNS, open_rows
from unslothd_server.errors import PermissionDeniedError

SECRET = {"text": "secret"}
ROWS = [{"text": f"row {number}"} for number in range(ROWS_FOR_COLUMNS * 2)]


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    folder = tmp_path / "others"
    folder.mkdir()
    (folder / "rows.jsonl").write_text(json.dumps(SECRET))
    return folder / "rows.jsonl"


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """As the server found it: a real path below a root."""
    folder = tmp_path / "root" / "data"
    folder.mkdir(parents=True)
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    return folder / "rows.jsonl"


def by_a_link(rows: Path, secret: Path) -> None:
    rows.unlink()
    rows.symlink_to(secret)


def by_a_link_to_its_folder(rows: Path, secret: Path) -> None:
    rows.parent.rename(rows.parent.with_name("moved"))
    rows.parent.symlink_to(secret.parent)


def by_a_pipe(rows: Path, secret: Path) -> None:
    rows.unlink()
    os.mkfifo(rows)


@pytest.mark.parametrize("swap", [by_a_link, by_a_link_to_its_folder, by_a_pipe])
@pytest.mark.timeout(20)
def test_a_file_that_was_swapped_is_refused(rows: Path, secret: Path, swap: Callable[[Path, Path], None]):
    swap(rows, secret)
    with pytest.raises(PermissionDeniedError, match="was replaced after the server had checked it") as caught:
        open_rows(DatasetSource(path=str(rows)))
    assert caught.value.reason == ErrorReason.ERROR_REASON_PATH_NOT_ALLOWED


@pytest.mark.parametrize("swap", [by_a_link, by_a_link_to_its_folder])
def test_a_file_that_is_swapped_while_it_is_read_is_read_to_its_own_end(
    rows: Path, secret: Path, swap: Callable[[Path, Path], None]
):
    found = open_rows(DatasetSource(path=str(rows)))
    swap(rows, secret)
    assert list(found.rows) == ROWS


@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv", ".parquet", ".arrow"])
def test_a_file_that_is_swapped_before_its_first_row_is_read_is_read_all_the_same(
    rows: Path, secret: Path, kind: str, monkeypatch: pytest.MonkeyPatch
):
    table = pyarrow.Table.from_pylist(ROWS)
    path = rows.with_suffix(kind)
    match kind:
        case ".json":
            path.write_text(json.dumps(ROWS))
        case ".csv":
            pyarrow.csv.write_csv(table, path)
        case ".parquet":
            pyarrow.parquet.write_table(table, path)
        case ".arrow":
            with pyarrow.ipc.new_stream(path, table.schema) as writer:
                writer.write_table(table)

    def open_then_swap(path: Path) -> PinnedFile:
        file = open_pinned(path)
        by_a_link(path, secret)
        return file

    monkeypatch.setattr(rows_module, "open_pinned", open_then_swap)
    assert list(open_rows(DatasetSource(path=str(path))).rows) == ROWS


def sum_after(rows: Path, meanwhile: Callable[[], object]) -> FileSum | None:
    """The sum of the file that rows were read from, taken after something happened to its name or to itself."""
    with closing(open_rows(DatasetSource(path=str(rows)))) as found:
        meanwhile()
        list(found.rows)
        return found.file_sum()


def known_by(content: bytes) -> FileSum:
    return FileSum(len(content), hashlib.sha256(content).hexdigest())


@pytest.mark.parametrize("swap", [by_a_link, by_a_link_to_its_folder, by_a_pipe])
def test_the_sum_is_that_of_the_file_that_was_read(rows: Path, secret: Path, swap: Callable[[Path, Path], None]):
    content = rows.read_bytes()
    assert sum_after(rows, lambda: swap(rows, secret)) == known_by(content)


def test_a_file_that_is_written_to_while_it_is_read_has_no_sum(rows: Path):
    def append() -> None:
        with rows.open("ab") as file:
            file.write(b"\n" + json.dumps(SECRET).encode())

    assert sum_after(rows, append) is None


def test_the_sum_is_of_the_whole_file_also_where_only_the_first_rows_are_wanted(rows: Path):
    with closing(open_rows(DatasetSource(path=str(rows), limit=1))) as found:
        assert list(found.rows) == ROWS[:1]
        assert found.file_sum() == known_by(rows.read_bytes())


def test_a_folder_that_a_link_leads_to_by_now_is_refused(rows: Path, secret: Path):
    by_a_link_to_its_folder(rows, secret)
    with pytest.raises(PermissionDeniedError, match="was replaced"):
        open_rows(DatasetSource(path=str(rows.parent)))
