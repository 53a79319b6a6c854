"""Datasets when the disk or the check lets them down: whole or not there, and always a clear answer."""

import asyncio
import errno
import hashlib
import os
import sys
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from unslothd.v1.dataset_pb2 import DataFormat, Dataset
from unslothd.v1.service_pb2 import ListDatasetsRequest, UploadDatasetHeader, UploadDatasetRequest
from unslothd_server.app.dataset_store import DatasetStore
from unslothd_server.app.datasets import Datasets
from unslothd_server.app.ports import RowsFound
from unslothd_server.errors import DatasetError, ExhaustedError, NotFoundError, PreconditionError, UnslothdError
from unslothd_server.workers.row_checker import SubprocessRowChecker

DATA = b'{"text": "a"}\n'
SHA256 = hashlib.sha256(DATA).hexdigest()
ID = f"sha256:{SHA256}"


class Content:
    """Finds one row in whatever it is given, once it has all of it."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.over = False
        self.closed = False

    async def start(self, rows: Path, data_format: DataFormat.ValueType) -> "Content":
        return self

    def grown(self, num_bytes: int) -> None:
        self.sizes.append(num_bytes)

    def end(self) -> None:
        self.over = True

    async def verdict(self) -> RowsFound:
        assert self.over
        return RowsFound(1, ["text"])

    async def close(self) -> None:
        self.closed = True


def registry(folder: Path, checker: Any = None, *, max_bytes: int = 1000) -> Datasets:
    return Datasets(DatasetStore(folder / "datasets"), checker or Content(), max_bytes=max_bytes)


async def upload(datasets: Datasets, *chunks: bytes, name: str = "", sha256: str = "") -> tuple[Dataset, bool]:
    async def requests() -> AsyncIterator[UploadDatasetRequest]:
        yield UploadDatasetRequest(
            header=UploadDatasetHeader(format=DataFormat.DATA_FORMAT_JSONL, name=name, sha256=sha256)
        )
        for chunk in chunks:
            yield UploadDatasetRequest(chunk=chunk)

    return await datasets.receive(requests())


def run(scenario: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(scenario(), 60))


def content(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "datasets").iterdir())


def no_space(*_: object, **__: object) -> Any:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_chunks_are_on_disk_in_their_order_before_the_check_hears_of_them(tmp_path: Path):
    async def scenario() -> None:
        checker = Content()
        dataset, _ = await upload(registry(tmp_path, checker), b'{"text"', b": ", b'"a"}\n')
        assert dataset.dataset_id == ID
        assert checker.sizes == sorted(checker.sizes)
        assert checker.sizes[-1] == len(DATA)
        assert checker.closed

    run(scenario)


@pytest.mark.parametrize("call", ["write", "fsync", "rename", "mkdtemp"])
def test_a_full_disk_is_told_and_leaves_nothing(call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    async def scenario() -> None:
        datasets = registry(tmp_path)
        owner, name = {
            "write": ("unslothd_server.app.dataset_store.IncomingRows", "write"),
            "fsync": ("os", "fsync"),
            "rename": ("pathlib.Path", "rename"),
            "mkdtemp": ("tempfile", "mkdtemp"),
        }[call]
        with monkeypatch.context() as patch:
            patch.setattr(f"{owner}.{name}", no_space)
            with pytest.raises(ExhaustedError) as caught:
                await upload(datasets, DATA)
        assert caught.value.reason_name == "DISK_FULL"
        assert content(tmp_path) == []
        assert (await upload(datasets, DATA))[1] is False  # there is room again

    run(scenario)


def test_a_disk_that_fails_behind_a_write_is_told_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    async def scenario() -> None:
        monkeypatch.setattr(os, "fdatasync", no_space)
        with pytest.raises(ExhaustedError):
            await upload(registry(tmp_path, max_bytes=1 << 30), *[b"x" * (1 << 20)] * 40)
        assert content(tmp_path) == []

    run(scenario)


def test_a_dataset_is_deleted_from_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    async def scenario() -> None:
        datasets = registry(tmp_path)
        await upload(datasets, DATA)
        for name in ("mkdir", "open"):
            monkeypatch.setattr(os, name, no_space)
        await datasets.delete(ID, [])

    run(scenario)
    monkeypatch.undo()
    assert registry(tmp_path).list_page(ListDatasetsRequest()) == ([], "")


def test_a_dataset_in_use_stays_whole(tmp_path: Path):
    async def scenario() -> None:
        datasets = registry(tmp_path)
        await upload(datasets, DATA)
        with pytest.raises(PreconditionError, match="training-1"):
            await datasets.delete(ID, ["training-1"])
        assert datasets.rows_of(ID).read_bytes() == DATA

    run(scenario)


def test_a_deletion_is_seen_before_anything_else_runs(tmp_path: Path):
    """Otherwise a training could be accepted on rows that are about to go."""

    async def scenario() -> None:
        datasets = registry(tmp_path)
        await upload(datasets, DATA)
        deletion = datasets.delete(ID, [])
        deletion.send(None)  # up to its first wait
        with pytest.raises(NotFoundError):
            datasets.rows_of(ID)
        deletion.close()

    run(scenario)


def test_a_new_registry_has_what_the_one_before_stored_and_clears_its_leftovers(tmp_path: Path):
    async def scenario() -> None:
        dataset, _ = await upload(registry(tmp_path), DATA, name="kept")
        for leftover in (".upload-abc", ".removed-abc"):
            (tmp_path / "datasets" / leftover).mkdir()
            (tmp_path / "datasets" / leftover / "rows.jsonl").write_bytes(DATA)
        again = registry(tmp_path)
        assert again.get(ID) == dataset
        assert again.rows_of(ID).read_bytes() == DATA
        assert content(tmp_path) == [SHA256]

    run(scenario)


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "meta.json").write_text("{"),
        lambda folder: (folder / "meta.json").write_text('{"version": 99, "dataset": {}}'),
        lambda folder: (folder / "rows.jsonl").write_bytes(b"half"),
        lambda folder: (folder / "rows.jsonl").unlink(),
    ],
    ids=["no JSON", "a newer version", "half the rows", "no rows"],
)
def test_a_damaged_folder_is_not_shown_and_an_upload_mends_it(damage: Callable[[Path], Any], tmp_path: Path):
    async def scenario() -> None:
        await upload(registry(tmp_path), DATA)
        damage(tmp_path / "datasets" / SHA256)
        again = registry(tmp_path)
        with pytest.raises(NotFoundError):
            again.get(ID)
        assert (await upload(again, DATA, sha256=SHA256))[1] is False
        assert registry(tmp_path).rows_of(ID).read_bytes() == DATA

    run(scenario)


def test_too_many_bytes_are_refused_while_they_come(tmp_path: Path):
    async def scenario() -> None:
        with pytest.raises(ExhaustedError) as caught:
            await upload(registry(tmp_path), b"x" * 900, b"x" * 101, b"never looked at")
        assert (caught.value.reason_name, caught.value.metadata) == ("DATASET_TOO_LARGE", {"max_bytes": "1000"})
        assert content(tmp_path) == []

    run(scenario)


# --- the process that checks ---

DEATHS = {
    "by a signal": "import os; os.kill(os.getpid(), 9)",
    "by an error": "raise ValueError('nobody foresaw this')",
    "without a word": "",
    "in the middle of its answer": "print('{', end='')",
    "out of memory": "import sys; from unslothd_server.row_check.__main__ import _limit; _limit(); bytearray(3 << 30)",
}


def checker(program: str, **more: Any) -> SubprocessRowChecker:
    environment = {"PYTHONPATH": os.pathsep.join(sys.path)}
    return SubprocessRowChecker(command=(sys.executable, "-c", program), environ=environment, **more)


@pytest.mark.parametrize("death", DEATHS)
def test_a_check_that_dies_is_damage_and_not_an_internal_error(death: str, tmp_path: Path):
    async def scenario() -> None:
        with pytest.raises(DatasetError) as caught:
            await upload(registry(tmp_path, checker(DEATHS[death])), DATA)
        assert caught.value.reason_name == "DATASET_DAMAGED"
        assert "smaller parts" in caught.value.message
        assert content(tmp_path) == []

    run(scenario)


def test_a_check_that_does_not_end_is_ended(tmp_path: Path):
    async def scenario() -> None:
        endless = checker("import signal; signal.pause()", seconds=0.2)
        with pytest.raises(DatasetError, match="in time"):
            await upload(registry(tmp_path, endless), DATA)

    run(scenario)


def test_a_check_sees_no_secret_of_the_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    async def scenario() -> None:
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        program = "import os, sys; open(sys.argv[2] + '.env', 'w').write(repr(os.environ))"
        checking = SubprocessRowChecker(command=(sys.executable, "-c", program))
        check = await checking.start(tmp_path / "rows", DataFormat.DATA_FORMAT_JSONL)
        with pytest.raises(UnslothdError):
            await check.verdict()
        await check.close()
        assert "hf_secret" not in (tmp_path / "rows.env").read_text()

    run(scenario)
