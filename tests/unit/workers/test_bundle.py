"""A worker's folder: who may look in, where the socket is, what stays when it is removed."""

import errno
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest

from unslothd.worker.v1.bootstrap_pb2 import WorkerBootstrap
from unslothd_server.workers.bundle import MAX_SOCKET_PATH_BYTES, Bundle


def create(home: Path, model_id: str = "llama-unsloth") -> Bundle:
    return Bundle.create(home, model_id, device_map="auto", cache_dir=home / "cache")


def test_the_bootstrap_file_tells_the_worker_everything(tmp_path: Path):
    bundle = create(tmp_path)

    told = WorkerBootstrap.FromString((tmp_path / "workers/llama-unsloth/bootstrap.binpb").read_bytes())

    assert told == bundle.bootstrap
    assert told == WorkerBootstrap(
        bootstrap_version=1,
        model_id="llama-unsloth",
        bundle_dir=str(tmp_path / "workers/llama-unsloth"),
        socket_path=str(tmp_path / "workers/llama-unsloth/worker.sock"),
        server_home=str(tmp_path),
        device_map="auto",
        cache_dir=str(tmp_path / "cache"),
    )


def test_nobody_else_can_enter_the_folder(tmp_path: Path):
    bundle = create(tmp_path)

    assert bundle.layout.directory.stat().st_mode & 0o777 == 0o700
    assert bundle.layout.cwd.is_dir()


def test_a_long_home_gets_a_short_private_socket_path_that_goes_with_the_folder(tmp_path: Path):
    home = tmp_path / ("h" * 60) / ("o" * 60)
    bundle = create(home)
    socket = bundle.socket_path

    assert len(bytes(socket)) <= MAX_SOCKET_PATH_BYTES
    assert socket.parent.stat().st_mode & 0o777 == 0o700
    assert Bundle.open(bundle.layout.directory) == bundle

    socket.touch()
    bundle.remove(home)
    assert not socket.parent.exists()


@pytest.mark.parametrize("extra", [0, 1])
def test_the_limit_of_a_socket_path_is_counted_in_bytes(tmp_path: Path, extra: int):
    room = MAX_SOCKET_PATH_BYTES - len(bytes(tmp_path / "workers" / "x" / "worker.sock")) + 1
    bundle = create(tmp_path, "é" * (room // 2) + "e" * (room % 2 + extra))

    assert len(bytes(bundle.socket_path)) <= MAX_SOCKET_PATH_BYTES
    assert (bundle.socket_path.parent == bundle.layout.directory) == (extra == 0)
    bundle.remove(tmp_path)


def test_removing_keeps_the_log_and_nothing_else(tmp_path: Path):
    bundle = create(tmp_path)
    bundle.layout.log.write_text("error id 123")

    bundle.remove(tmp_path)
    bundle.remove(tmp_path)

    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [tmp_path / "logs/worker-llama-unsloth.log"]
    assert (tmp_path / "logs/worker-llama-unsloth.log").read_text() == "error id 123"


def test_what_a_dead_predecessor_left_is_gone_in_a_new_folder(tmp_path: Path):
    first = create(tmp_path)
    first.layout.exit_record.write_text("{}")
    (first.layout.cwd / "unsloth_compiled_cache").mkdir()

    second = create(tmp_path)

    assert not second.layout.exit_record.exists()
    assert list(second.layout.cwd.iterdir()) == []


def test_a_folder_without_a_bootstrap_file_can_be_opened_and_removed(tmp_path: Path):
    bundle = create(tmp_path)
    bundle.layout.bootstrap.unlink()

    opened = Bundle.open(bundle.layout.directory)

    assert opened.model_id == "llama-unsloth"
    opened.remove(tmp_path)
    assert not bundle.layout.directory.exists()


@pytest.mark.parametrize("model_id", ["", ".", "..", "a/b", "../x", "a\0b"])
def test_an_id_that_is_no_plain_name_makes_no_folder(tmp_path: Path, model_id: str):
    with pytest.raises(ValueError, match="cannot be the name of a folder"):
        create(tmp_path, model_id)

    assert list(tmp_path.iterdir()) == []


def test_two_that_remove_the_same_folder_at_once_both_succeed(tmp_path: Path):
    both = Barrier(2, timeout=10)

    def remove(bundle: Bundle) -> None:
        both.wait()
        bundle.remove(tmp_path)

    with ThreadPoolExecutor(2) as threads:
        for _ in range(50):
            bundle = create(tmp_path)
            bundle.layout.log.write_text("what it said")
            for number in range(20):
                (bundle.layout.cwd / str(number)).touch()
            for removed in [threads.submit(remove, bundle) for _ in range(2)]:
                removed.result(10)
            assert not bundle.layout.directory.exists()
            assert (tmp_path / "logs/worker-llama-unsloth.log").read_text() == "what it said"


def test_a_file_that_a_dying_worker_writes_meanwhile_is_removed_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    bundle = create(tmp_path)
    rmtree, tries = shutil.rmtree, []

    def beside_a_writer(path: Path) -> None:
        tries.append(path)
        if len(tries) == 1:
            raise OSError(errno.ENOTEMPTY, "Directory not empty")
        rmtree(path)

    monkeypatch.setattr(shutil, "rmtree", beside_a_writer)
    bundle.remove(tmp_path)
    assert not bundle.layout.directory.exists()


def test_a_folder_that_cannot_be_removed_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(path: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    bundle = create(tmp_path)
    monkeypatch.setattr(shutil, "rmtree", refuse)
    with pytest.raises(PermissionError):
        bundle.remove(tmp_path)
