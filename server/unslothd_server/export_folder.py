"""Folders that appear whole or not at all: written under a hidden name beside, hashed, then renamed."""

import errno
import hashlib
import os
import shutil
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import Path

from unslothd.v1.artifact_pb2 import ArtifactFile
from unslothd.v1.error_reason_pb2 import ErrorReason
from unslothd_server.errors import AlreadyExistsError

_CHUNK_BYTES = 1 << 20


def partial_of(folder: Path) -> Path:
    """The name under which a folder is written. No request can ask for it: names with a leading dot are refused."""
    return folder.with_name(f".{folder.name}.partial")


@contextmanager
def appearing_whole(folder: Path) -> Generator[Path]:
    """Gives an empty folder to write to; it gets the name `folder` at the end of the block, or is removed on an error.

    Raises:
        AlreadyExistsError: `folder` got content meanwhile (OUTPUT_DIR_TAKEN); it is left as it is.
        OSError: The disk fails.
    """
    work = partial_of(folder)
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        yield work
        _give_name(work, folder)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


def _give_name(work: Path, folder: Path) -> None:
    try:
        work.rename(folder)
    except OSError as error:
        if error.errno not in {errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR}:
            raise
        raise AlreadyExistsError(
            ErrorReason.ERROR_REASON_OUTPUT_DIR_TAKEN,
            f"{folder} got other content while the export was written. Choose another output_dir.",
        ) from error


def remove_partial(folder: Path) -> None:
    """Removes what a writer that died left of `folder`. One that lives fails, and its folder never appears."""
    doomed = folder.with_name(f".{folder.name}.removed")
    with suppress(FileNotFoundError):
        partial_of(folder).rename(doomed)  # in one step: a writer must not rename what is half removed
    shutil.rmtree(doomed, ignore_errors=True)


def hashed_files(folder: Path, report: Callable[[int, int], None] = lambda done, total: None) -> list[ArtifactFile]:
    """Returns the regular files below a folder in the order of their names; links are left out.

    Args:
        folder: Every file in it is on the disk afterwards.
        report: Told bytes done and in all.
    """
    paths = regular_files(folder)
    total = sum(path.stat().st_size for path in paths.values())
    files: list[ArtifactFile] = []
    done = 0
    for name, path in paths.items():
        digest, size = hashlib.sha256(), 0
        with path.open("rb") as stream:
            os.fsync(stream.fileno())
            while chunk := stream.read(_CHUNK_BYTES):
                digest.update(chunk)
                size += len(chunk)
                report(done + size, total)
        done += size
        files.append(ArtifactFile(name=name, num_bytes=size, sha256=digest.hexdigest()))
    return files


def regular_files(folder: Path) -> dict[str, Path]:
    """The files below a folder by name, with "/" between parts, in the order of their names; no link is followed."""
    paths = [Path(parent, name) for parent, _, names in os.walk(folder) for name in names]
    kept = [path for path in paths if path.is_file() and not path.is_symlink()]
    return dict(sorted((path.relative_to(folder).as_posix(), path) for path in kept))
