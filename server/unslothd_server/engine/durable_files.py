"""Files that outlive a power cut: written in one step, and known by size and SHA-256 once they are on the disk."""

import hashlib
import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

from unslothd_server.disk import sync_folder


@dataclass(frozen=True)
class FileSum:
    """What a file is known by.

    Args:
        num_bytes: Its size.
        sha256: Of its bytes, 64 lower-case hexadecimal digits.
    """

    num_bytes: int
    sha256: str


def sum_of(path: Path, *, sync: bool = False) -> FileSum:
    """Reads a file.

    Args:
        path: The file.
        sync: Wait first until its bytes are on the disk.
    """
    with path.open("rb") as file:
        if sync:
            os.fsync(file.fileno())
        return sum_of_open(file)


def sum_of_open(file: BufferedReader) -> FileSum:
    """Reads an open file from its beginning."""
    file.seek(0)
    return FileSum(os.fstat(file.fileno()).st_size, hashlib.file_digest(file, "sha256").hexdigest())


def sums_of(folder: Path, *, without: Collection[str] = ()) -> dict[str, FileSum]:
    """Brings every file below a folder to the disk and reads it. Returns relative POSIX paths and their sums, sorted.

    Args:
        folder: The folder.
        without: Relative paths that are left out.
    """
    names = sorted(name for name in _names(folder) if name not in without)
    return {name: sum_of(folder / name, sync=True) for name in names}


def write_text(path: Path, text: str) -> None:
    """Writes a file that is there in whole or not at all, and on the disk on return."""
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)
    sync_folder(path.parent)


def as_json(sums: Mapping[str, FileSum]) -> dict[str, Any]:
    """Sums as they stand in a manifest or a receipt."""
    return {name: asdict(known) for name, known in sums.items()}


def difference(folder: Path, known: Mapping[str, Any], *, contents: bool = True) -> str | None:
    """Says what the first file has that is not as it was; None when all are. Files that were not known do not count.

    Args:
        folder: The folder.
        known: As `as_json` made it; anything may be in it, for it was read from a file.
        contents: Read the files too; else only their sizes are compared.
    """
    for name, told in known.items():
        path = folder / name
        try:
            wanted = FileSum(num_bytes=int(told["num_bytes"]), sha256=str(told["sha256"]))
        except (KeyError, TypeError, ValueError):
            return f"what is known of {name} cannot be read"
        if not path.is_file():
            return f"{name} is missing"
        size = path.stat().st_size
        if size != wanted.num_bytes:
            return f"{name} has {size} bytes instead of {wanted.num_bytes}"
        if contents and sum_of(path) != wanted:
            return f"the contents of {name} have changed"
    return None


def _names(folder: Path) -> Iterator[str]:
    for parent, _, files in os.walk(folder):
        for name in files:
            yield (Path(parent) / name).relative_to(folder).as_posix()
