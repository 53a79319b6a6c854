"""What is said of a disk that takes no more writes."""

import errno
import os
from pathlib import Path

import pytest

from unslothd_server import disk
from unslothd_server.engine import disk_faults
from unslothd_server.errors import UnslothdError


def told(number: int, folder: Path) -> UnslothdError | None:
    return disk.unwritable(OSError(number, os.strerror(number)), folder, "try again")


def test_a_full_disk_is_told_with_its_path_and_with_what_is_free_and_needed(tmp_path: Path):
    error = disk.full(tmp_path, "No space left on device", "try again", needed_bytes=3 * 2**29)
    assert error.reason_name == "DISK_FULL"
    assert error.message.startswith(f"The disk that holds {tmp_path} is full (No space left on device, ")
    assert error.message.endswith("about 1.5 GiB needed). Free some space, then try again.")
    assert error.metadata["path"] == str(tmp_path)
    assert int(error.metadata["free_bytes"]) > 0
    assert error.metadata["needed_bytes"] == str(3 * 2**29)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_no_room_of_any_kind_is_a_full_disk(number: int, tmp_path: Path):
    error = told(number, tmp_path)
    assert error is not None
    assert error.reason_name == "DISK_FULL"


def test_a_limit_on_the_size_of_a_file_says_nothing_of_free_bytes(tmp_path: Path):
    error = told(errno.EFBIG, tmp_path)
    assert error is not None
    assert set(error.metadata) == {"path"}


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.EPERM])
def test_what_may_not_be_written_to_is_not_a_full_disk(number: int, tmp_path: Path):
    error = told(number, tmp_path)
    assert error is not None
    assert error.reason_name == "NOT_WRITABLE"
    assert "Make it writable for the server's user, then try again" in error.message


def test_another_error_is_not_told_as_a_disk(tmp_path: Path):
    assert told(errno.EIO, tmp_path) is None


@pytest.mark.parametrize(
    "text",
    [
        "[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534",
        "PytorchStreamWriter failed writing file data/0: file write failed",
        "write(): fd 3 failed with File too large",
    ],
)
def test_torch_on_a_full_disk_is_understood(text: str, tmp_path: Path):
    error = disk_faults.disk_fault(RuntimeError(text), tmp_path, "try again")
    assert error is not None
    assert error.reason_name == "DISK_FULL"


def test_a_file_that_may_not_be_read_elsewhere_is_not_told_as_this_folder(tmp_path: Path):
    elsewhere = PermissionError(errno.EACCES, "Permission denied", "/data/rows.jsonl")
    here = PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "checkpoint-2" / "optimizer.pt"))
    assert disk_faults.disk_fault(elsewhere, tmp_path, "try again") is None
    assert disk_faults.disk_fault(here, tmp_path, "try again") is not None
