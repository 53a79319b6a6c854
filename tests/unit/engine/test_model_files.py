"""Files of a model that are swapped while a library reads them by their names: what was read is not used."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from support.waiting import wait_until
from unslothd_server.engine.model_files import ModelFiles
from unslothd_server.errors import PermissionDeniedError


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A model in a root, whose weights are a link to a blob beside it, as the Hub's cache has them."""
    folder = tmp_path / "root" / "model"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder.parent / "blob").write_bytes(b"weights")
    (folder / "model.safetensors").symlink_to("../blob")
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "config.json").write_text("[]")
    newest = (tmp_path / "secret" / "config.json").stat().st_ctime_ns
    wait_until(lambda: changed_now(tmp_path / "clock") > newest)  # the clock of files goes in steps of milliseconds
    return tmp_path / "root"


def changed_now(clock: Path) -> int:
    clock.write_text("")
    return clock.stat().st_ctime_ns


def by_another_file(model: Path, secret: Path) -> None:
    (secret / "config.json").rename(model / "config.json")


def by_a_link(model: Path, secret: Path) -> None:
    (model / "config.json").unlink()
    (model / "config.json").symlink_to(secret / "config.json")


def by_another_target_of_a_link(model: Path, secret: Path) -> None:
    (model.parent / "blob").unlink()
    (model.parent / "blob").write_bytes(b"weighty")


def by_a_link_to_another_folder(model: Path, secret: Path) -> None:
    model.rename(model.with_name("moved"))
    model.symlink_to(secret)


def by_other_bytes(model: Path, secret: Path) -> None:
    status = (model / "config.json").stat()
    (model / "config.json").write_text("[]")
    os.utime(model / "config.json", ns=(status.st_atime_ns, status.st_mtime_ns))


def by_one_more(model: Path, secret: Path) -> None:
    (model / "pytorch_model.bin").touch()


def by_one_less(model: Path, secret: Path) -> None:
    (model / "config.json").unlink()


def and_put_back(model: Path, secret: Path) -> None:
    (model / "config.json").rename(model / "aside")
    by_another_file(model, secret)
    (model / "config.json").unlink()
    (model / "aside").rename(model / "config.json")


def by_a_pipe(model: Path, secret: Path) -> None:
    (model / "config.json").unlink()
    os.mkfifo(model / "config.json")


SWAPS = [
    by_another_file,
    by_a_link,
    by_another_target_of_a_link,
    by_a_link_to_another_folder,
    by_other_bytes,
    by_one_more,
    by_one_less,
    and_put_back,
    by_a_pipe,
]


@pytest.mark.parametrize("swap", SWAPS)
@pytest.mark.parametrize("bounded", [True, False], ids=["roots", "no roots"])
@pytest.mark.timeout(20)
def test_what_was_swapped_is_noticed(root: Path, swap: Callable[[Path, Path], None], bounded: bool):
    files = ModelFiles([root / "model"], [root] if bounded else [])
    swap(root / "model", root.parent / "secret")
    with pytest.raises(PermissionDeniedError, match="Load it again once nobody changes these files") as caught:
        files.require_unchanged()
    assert caught.value.reason_name == "PATH_NOT_ALLOWED"


def test_reading_changes_nothing_and_neither_does_what_lies_beside(root: Path):
    files = ModelFiles([root / "model"], [root])
    (root / "model" / "config.json").read_text()
    (root / "another").mkdir()
    files.require_unchanged()


def test_a_single_file_is_looked_at_as_a_folder_is(root: Path):
    files = ModelFiles([root / "blob"], [root])
    files.require_unchanged()
    (root / "blob").write_bytes(b"others")
    with pytest.raises(PermissionDeniedError, match="blob"):
        files.require_unchanged()


@pytest.mark.parametrize("place", ["a file", "a folder in it", "the folder itself"])
def test_what_leads_out_of_the_roots_is_refused_before_it_is_read(root: Path, place: str):
    model, secret = root / "model", root.parent / "secret"
    match place:
        case "a file":
            by_a_link(model, secret)
        case "a folder in it":
            (model / "more").symlink_to(secret)
        case _:
            by_a_link_to_another_folder(model, secret)
    with pytest.raises(PermissionDeniedError, match="leads out of the folders"):
        ModelFiles([model], [root])


@pytest.mark.parametrize("target", [".", "link", "nothing"], ids=["its own folder", "itself", "nothing"])
def test_a_link_to_what_no_library_reads_is_nothing_wrong(root: Path, target: str):
    (root / "model" / "link").symlink_to(target)
    ModelFiles([root / "model"], [root]).require_unchanged()
