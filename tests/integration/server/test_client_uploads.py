"""The Python client uploads whatever users have: tables as Arrow streams, files as they are, other rows as JSONL."""

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pyarrow as pa
import pytest

import unslothd
from doubles.fake_worker import fake_row
from support.running_server import RunningServer
from support.uploads import as_arrow, as_csv, as_jsonl, as_parquet
from unslothd.v1.dataset_pb2 import DataFormat

JSONL, ARROW = DataFormat.DATA_FORMAT_JSONL, DataFormat.DATA_FORMAT_ARROW_STREAM


@pytest.fixture(scope="module")
def client(server: RunningServer) -> Iterator[unslothd.Client]:
    with unslothd.Client(server.target) as opened:
        yield opened


def rows_named(word: str, count: int = 5) -> list[dict[str, Any]]:
    """Rows that no other test has."""
    return [{"text": f"{word} {number}", "number": number} for number in range(count)]


def stored_rows(server: RunningServer, dataset: unslothd.Dataset) -> list[dict[str, Any]]:
    (path,) = (server.home / "datasets" / dataset.dataset_id.removeprefix("sha256:")).glob("rows.*")
    if dataset.format == JSONL:
        return [json.loads(line) for line in path.read_text().splitlines()]
    return pa.ipc.open_stream(path.read_bytes()).read_all().to_pylist()


class OnlyAStream:
    """A table of a library that speaks Arrow's C interface, such as polars."""

    def __init__(self, table: pa.Table) -> None:
        self._table = table

    def __arrow_c_stream__(self, requested_schema: object = None) -> object:
        return self._table.__arrow_c_stream__(requested_schema)


KINDS: dict[str, tuple[Callable[[list[dict[str, Any]]], Any], DataFormat.ValueType]] = {
    "list": (list, JSONL),
    "generator": (lambda rows: (row for row in rows), JSONL),
    "iterable dataset": (lambda rows: datasets.IterableDataset.from_generator(lambda: iter(rows)), JSONL),
    "pandas": (pd.DataFrame, ARROW),
    "pyarrow table": (pa.Table.from_pylist, ARROW),
    "pyarrow reader": (lambda rows: pa.Table.from_pylist(rows).to_reader(max_chunksize=2), ARROW),
    "arrow C stream": (lambda rows: OnlyAStream(pa.Table.from_pylist(rows)), ARROW),
    "datasets": (datasets.Dataset.from_list, ARROW),
}


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_every_kind_are_stored(kind: str, server: RunningServer, client: unslothd.Client):
    make, data_format = KINDS[kind]
    rows = rows_named(kind)
    dataset = client.upload_dataset(make(rows), name=kind)
    assert (dataset.name, dataset.format, dataset.num_rows) == (kind, data_format, len(rows))
    assert list(dataset.columns) == ["text", "number"]
    assert stored_rows(server, dataset) == rows


def test_a_dataset_is_stored_in_the_order_that_it_was_filtered_and_shuffled_to(
    server: RunningServer, client: unslothd.Client
):
    whole = datasets.Dataset.from_list(rows_named("shuffled", 3000))
    chosen = whole.filter(lambda row: row["number"] % 3 == 0).shuffle(seed=7)
    dataset = client.upload_dataset(chosen)
    assert stored_rows(server, dataset) == chosen.to_list()
    assert dataset.num_rows == 1000


def test_a_frame_of_mixed_types_is_sent_as_rows(server: RunningServer, client: unslothd.Client):
    dataset = client.upload_dataset(pd.DataFrame({"a": [1, "x", None]}))
    assert stored_rows(server, dataset) == [{"a": 1}, {"a": "x"}, {"a": None}]


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet", "arrow"])
def test_a_local_file_is_stored_byte_by_byte(
    suffix: str, server: RunningServer, client: unslothd.Client, tmp_path: Path
):
    make = {"jsonl": as_jsonl, "csv": as_csv, "parquet": as_parquet, "arrow": as_arrow}[suffix]
    data = make(rows_named(f"a file of {suffix}"))
    (tmp_path / f"rows.{suffix}").write_bytes(data)
    (tmp_path / "rows.of-another-name").write_bytes(data)
    dataset = client.upload_dataset(str(tmp_path / f"rows.{suffix}"))
    (stored,) = (server.home / "datasets" / dataset.dataset_id.removeprefix("sha256:")).glob("rows.*")
    assert stored.read_bytes() == data
    assert client.upload_dataset(tmp_path / "rows.of-another-name", format=suffix) == dataset


def test_a_json_file_with_a_list_of_rows_is_stored_as_jsonl(
    server: RunningServer, client: unslothd.Client, tmp_path: Path
):
    rows = rows_named("a list in a file")
    (tmp_path / "rows.json").write_text(json.dumps(rows, indent=1))
    assert stored_rows(server, client.upload_dataset(tmp_path / "rows.json")) == rows


def test_progress_is_told_to_the_last_byte_and_known_rows_are_not_sent(client: unslothd.Client):
    table = pa.table({"text": [f"{number} " + "x" * 1000 for number in range(3000)]})
    told: list[unslothd.UploadProgress] = []
    dataset = client.upload_dataset(table, on_progress=told.append)
    assert [progress.total for progress in told] == [dataset.num_bytes] * len(told)
    assert told[-1].done == dataset.num_bytes
    assert [progress.done for progress in told] == sorted(progress.done for progress in told)
    told.clear()
    assert client.upload_dataset(table, name="again", on_progress=told.append) == dataset
    assert told == []


def test_an_error_in_the_callback_reaches_the_user_and_nothing_is_stored(client: unslothd.Client):
    before = client.list_datasets()

    def broken(progress: unslothd.UploadProgress) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        client.upload_dataset(rows_named("broken callback"), on_progress=broken)
    assert client.list_datasets() == before


def test_bad_rows_of_a_file_are_all_named(client: unslothd.Client, tmp_path: Path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "a"}\n[]\n{"text": "b"}\n{\n')
    with pytest.raises(unslothd.errors.InvalidRequest) as caught:
        client.upload_dataset(file)
    assert caught.value.reason == "DATASET_ROW"
    assert [violation.field for violation in caught.value.field_violations] == ["rows[2]", "rows[4]"]


def test_no_rows_are_refused(client: unslothd.Client):
    for empty in ([], pa.table({"text": pa.array([], pa.string())}), datasets.Dataset.from_dict({"text": []})):
        with pytest.raises(unslothd.errors.InvalidRequest) as caught:
            client.upload_dataset(empty)
        assert caught.value.reason == "DATASET_EMPTY"


def test_what_is_on_the_server_already_is_not_uploaded(client: unslothd.Client):
    with pytest.raises(unslothd.errors.InvalidRequest, match="nothing to upload"):
        client.upload_dataset(unslothd.ServerPath("rows.jsonl"))


def test_datasets_are_listed_got_and_deleted(client: unslothd.Client):
    first, second = (client.upload_dataset(rows_named(word)) for word in ("listed first", "listed second"))
    assert client.list_datasets(limit=2) == [second, first]
    assert client.get_dataset(first.dataset_id) == first
    client.delete_dataset(first)
    client.delete_dataset(unslothd.UploadedDataset(second.dataset_id))
    with pytest.raises(unslothd.errors.NotFound) as caught:
        client.get_dataset(first)
    assert caught.value.reason == "DATASET_NOT_FOUND"


def _large(make: Callable[[list[dict[str, Any]]], Any]) -> Any:
    return make([json.loads(fake_row(steps=1)), *({"text": "x" * 1000} for _ in range(5000))])


@pytest.mark.parametrize("kind", ["list", "generator", "file"])
def test_a_training_uploads_rows_that_are_too_large_for_a_request(
    kind: str, server: RunningServer, client: unslothd.Client, tmp_path: Path
):
    data = _large(lambda rows: (row for row in rows) if kind == "generator" else rows)
    if kind == "file":
        (tmp_path / "rows.jsonl").write_bytes(as_jsonl(data))
        data = tmp_path / "rows.jsonl"
    model = client.load_model("tiny")
    try:
        client.prepare(model)
        run = client.train(model, data, [json.loads(fake_row(steps=1))])
        run.result()
        training = client.get_training(run)
        assert client.get_dataset(training.train_dataset.dataset_id).num_rows == 5001
        assert training.eval_dataset.WhichOneof("origin") == "inline"
    finally:
        client.unload_model(model, force=True)


def test_a_wrong_option_is_told_before_anything_is_uploaded(client: unslothd.Client):
    before = client.list_datasets()
    with pytest.raises(TypeError, match="did you mean max_steps"):
        client.train("tiny", [{"text": "x" * 5_000_000}], max_step=3)  # pyright: ignore[reportCallIssue]
    assert client.list_datasets() == before


def test_the_async_client_uploads_too_and_trains_on_it(server: RunningServer):
    async def scenario() -> None:
        async with unslothd.AsyncClient(server.target) as client:
            rows = [json.loads(fake_row(steps=1)), *rows_named("async")]
            told: list[unslothd.UploadProgress] = []
            dataset = await client.upload_dataset(iter(rows), name="async", on_progress=told.append)
            assert told[-1].done == dataset.num_bytes
            assert await client.get_dataset(dataset) == dataset
            assert (await client.list_datasets(limit=1)) == [dataset]
            model = await client.load_model("tiny")
            await client.prepare(model)
            run = await client.train(model, dataset)
            await run.result()
            await client.unload_model(model)
            await client.delete_dataset(dataset)

    asyncio.run(asyncio.wait_for(scenario(), 120))


def test_an_async_upload_that_is_cancelled_leaves_nothing(server: RunningServer, client: unslothd.Client):
    before = client.list_datasets()

    async def scenario() -> None:
        async with unslothd.AsyncClient(server.target) as other:
            sending = asyncio.Event()
            loop = asyncio.get_running_loop()

            def stop(progress: unslothd.UploadProgress) -> None:
                loop.call_soon_threadsafe(sending.set)

            table = pa.table({"text": [f"cancelled {number} " + "x" * 100_000 for number in range(500)]})
            task = asyncio.create_task(other.upload_dataset(table, on_progress=stop))
            await sending.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(asyncio.wait_for(scenario(), 120))
    assert client.list_datasets() == before


def test_uploading_rows_imports_no_library_of_tables(server: RunningServer):
    program = (
        "import sys, unslothd\n"
        f"unslothd.Client({server.target!r}).upload_dataset([{{'text': 'light'}}])\n"
        "assert not {'pyarrow', 'pandas', 'datasets', 'numpy'} & set(sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", program], env=environment, timeout=60, check=True)
