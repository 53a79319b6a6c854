"""Folders that appear whole or not at all."""

import hashlib
from pathlib import Path

import pytest

from unslothd_server.errors import AlreadyExistsError
from unslothd_server.export_folder import appearing_whole, hashed_files, partial_of, remove_partial


def test_a_folder_appears_with_everything_in_it(tmp_path: Path):
    target = tmp_path / "below" / "export"
    with appearing_whole(target) as work:
        (work / "a").write_text("a")
        assert not target.exists()
        (work / "b").write_text("b")
    assert [path.name for path in sorted(target.iterdir())] == ["a", "b"]
    assert [path.name for path in target.parent.iterdir()] == ["export"]


def test_an_error_leaves_nothing(tmp_path: Path):
    def write() -> None:
        with appearing_whole(tmp_path / "export") as work:
            (work / "a").write_text("a")
            raise OSError("the disk is full")

    with pytest.raises(OSError, match="full"):
        write()
    assert list(tmp_path.iterdir()) == []


def test_what_a_dead_writer_left_is_written_anew(tmp_path: Path):
    left = partial_of(tmp_path / "export")
    left.mkdir()
    (left / "old").touch()
    with appearing_whole(tmp_path / "export") as work:
        (work / "new").touch()
    assert [path.name for path in (tmp_path / "export").iterdir()] == ["new"]


def test_a_folder_that_somebody_filled_meanwhile_is_left_as_it_is(tmp_path: Path):
    def write() -> None:
        with appearing_whole(tmp_path / "export") as work:
            (work / "a").touch()
            (tmp_path / "export").mkdir()
            (tmp_path / "export" / "theirs").touch()

    with pytest.raises(AlreadyExistsError) as raised:
        write()
    assert raised.value.reason_name == "OUTPUT_DIR_TAKEN"
    assert [path.name for path in (tmp_path / "export").iterdir()] == ["theirs"]
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


def test_a_writer_whose_folder_was_removed_cannot_finish(tmp_path: Path):
    def write() -> None:
        with appearing_whole(tmp_path / "export") as work:
            (work / "a").touch()
            remove_partial(tmp_path / "export")

    with pytest.raises(FileNotFoundError):
        write()
    assert list(tmp_path.iterdir()) == []


def test_files_are_hashed_in_the_order_of_their_names_and_links_are_left_out(tmp_path: Path):
    folder = tmp_path / "export"
    (folder / "sub").mkdir(parents=True)
    contents = {"b": b"bb", "a": b"a", "sub/c": b""}
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    (folder / "link").symlink_to(folder / "a")
    (folder / "linked").symlink_to(tmp_path)
    told: list[tuple[int, int]] = []
    files = hashed_files(folder, lambda done, total: told.append((done, total)))
    assert [file.name for file in files] == ["a", "b", "sub/c"]
    assert all(file.sha256 == hashlib.sha256(contents[file.name]).hexdigest() for file in files)
    assert told == [(1, 3), (3, 3)]
