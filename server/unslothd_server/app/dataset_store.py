"""The folder of each uploaded dataset: whole or not there at all, named by the SHA-256 of its bytes."""

import hashlib
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import structlog
from google.protobuf.json_format import MessageToDict, ParseDict, ParseError

from unslothd.v1.dataset_pb2 import DataFormat, Dataset
from unslothd.v1.error_reason_pb2 import ErrorReason
from unslothd_server import disk
from unslothd_server.errors import ExhaustedError

log = structlog.get_logger()

META_VERSION = 1
_META = "meta.json"
_ID_PREFIX = "sha256:"
# Folders of uploads that are under way and of datasets that are being removed; an id never begins so.
_UPLOAD, _REMOVED = ".upload-", ".removed-"
_SUFFIXES = {
    DataFormat.DATA_FORMAT_JSONL: "jsonl",
    DataFormat.DATA_FORMAT_PARQUET: "parquet",
    DataFormat.DATA_FORMAT_ARROW_STREAM: "arrow",
    DataFormat.DATA_FORMAT_CSV: "csv",
}


class IncomingRows:
    """Bytes of one upload on their way to the disk. Its methods block; one thread at a time calls them.

    Args:
        folder: Its own, empty.
        data_format: Encoding of the bytes.
    """

    def __init__(self, folder: Path, data_format: "DataFormat.ValueType") -> None:
        self.folder = folder
        self.path = folder / f"rows.{_SUFFIXES[data_format]}"
        self.num_bytes = 0
        self._sha256 = hashlib.sha256()
        self._file = self.path.open("xb")

    @property
    def sha256(self) -> str:
        """Hexadecimal digits of the bytes so far."""
        return self._sha256.hexdigest()

    def write(self, chunks: Sequence[bytes]) -> int:
        """Appends; returns the number of bytes in all. Raises OSError."""
        for chunk in chunks:
            self._file.write(chunk)
            self._sha256.update(chunk)
            self.num_bytes += len(chunk)
        self._file.flush()
        return self.num_bytes

    def flush(self) -> None:
        """Brings what is written so far to the disk; legal beside a `write`. Raises OSError."""
        os.fdatasync(self._file.fileno())

    def finish(self) -> None:
        """Brings every byte to the disk. Raises OSError."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def discard(self) -> None:
        """Removes what is there; does nothing after a commit. Repeatable."""
        try:
            self._file.close()
        except OSError as error:  # what the full disk did not take
            log.debug("an upload is discarded", error=str(error))
        shutil.rmtree(self.folder, ignore_errors=True)


class DatasetStore:
    """Folders of datasets below `<home>/datasets`; what a crash left half-done there is removed.

    Args:
        folder: That folder; made when missing.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        for leftover in [*folder.glob(f"{_UPLOAD}*"), *folder.glob(f"{_REMOVED}*")]:
            shutil.rmtree(leftover, ignore_errors=True)

    def load_all(self) -> list[Dataset]:
        """Reads every dataset. One that cannot be read is told in the log and left alone; an upload replaces it."""
        found = [self._read(path) for path in self._folder.glob(f"*/{_META}")]
        return [dataset for dataset in found if dataset is not None]

    def _read(self, path: Path) -> Dataset | None:
        try:
            dataset = _parsed(path)
            complete = self.rows_of(dataset).stat().st_size == dataset.num_bytes
        except (OSError, ValueError, KeyError, TypeError, ParseError) as error:
            log.warning("a dataset cannot be read", folder=str(path.parent), error=str(error))
            return None
        if not complete:
            log.warning("a dataset cannot be read", folder=str(path.parent), error="its rows have another size")
        return dataset if complete else None

    def rows_of(self, dataset: Dataset) -> Path:
        """The file with the rows."""
        return self._folder_of(dataset.dataset_id) / f"rows.{_SUFFIXES[dataset.format]}"

    def begin(self, data_format: "DataFormat.ValueType") -> IncomingRows:
        """Makes room for an upload. Raises OSError."""
        folder = Path(tempfile.mkdtemp(prefix=_UPLOAD, dir=self._folder))
        try:
            return IncomingRows(folder, data_format)
        except OSError:
            shutil.rmtree(folder, ignore_errors=True)
            raise

    def commit(self, incoming: IncomingRows, dataset: Dataset) -> None:
        """Makes finished bytes the dataset, in one step. Raises OSError.

        Args:
            incoming: After `finish`.
            dataset: What it is; its id is not taken.
        """
        content = {"version": META_VERSION, "dataset": MessageToDict(dataset, preserving_proto_field_name=True)}
        with (incoming.folder / _META).open("w", encoding="utf-8") as stream:
            json.dump(content, stream, indent=1)
            stream.flush()
            os.fsync(stream.fileno())
        target = self._folder_of(dataset.dataset_id)
        if target.exists():  # one that could not be read
            shutil.rmtree(self._set_aside(target))
        incoming.folder.rename(target)
        disk.sync_folder(self._folder)

    def take_away(self, dataset: Dataset) -> Path:
        """Makes a dataset vanish in one step; returns what is left to be removed. Raises OSError."""
        return self._set_aside(self._folder_of(dataset.dataset_id))

    def _set_aside(self, folder: Path) -> Path:
        # A new name needs no room, so that a full disk can be cleared.
        return folder.rename(self._folder / f"{_REMOVED}{folder.name}-{secrets.token_hex(4)}")

    def _folder_of(self, dataset_id: str) -> Path:
        return self._folder / dataset_id.removeprefix(_ID_PREFIX)


def _parsed(path: Path) -> Dataset:
    content = json.loads(path.read_text(encoding="utf-8"))
    if content["version"] != META_VERSION:
        raise ValueError(f"version {content['version']} is not known")
    return ParseDict(content["dataset"], Dataset(), ignore_unknown_fields=True)


def dataset_id_of(sha256: str) -> str:
    """The id of the bytes that have this digest."""
    return _ID_PREFIX + sha256


def explained(error: OSError) -> Exception:
    """Returns what a caller is told of a disk that fails: DISK_FULL, NOT_WRITABLE, or the error itself."""
    if error.errno not in disk.NO_ROOM:
        return disk.unwritable(error, Path("The folder of the datasets"), "upload again: nothing was kept") or error
    return ExhaustedError(
        ErrorReason.ERROR_REASON_DISK_FULL,
        "The disk that holds the datasets of this server is full, so nothing of the upload was kept. Delete datasets "
        "that are not needed, or free some space, then upload again.",
    )
