"""The folder of each training: what was asked, its event log, and its place on disk among the results."""

import errno
import json
import os
import secrets
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from google.protobuf.json_format import MessageToDict, ParseDict

from unslothd.v1.dataset_pb2 import DataFormat, DatasetSource
from unslothd.v1.error_reason_pb2 import ErrorReason
from unslothd.v1.training_pb2 import Training
from unslothd.worker.v1.worker_service_pb2 import StartTrainingRequest
from unslothd_server.errors import AlreadyExistsError, ExhaustedError
from unslothd_server.event_log import EVENT_LOG_NAME

STATE_VERSION = 1
FINAL = "final"

_SUFFIXES = {
    DataFormat.DATA_FORMAT_UNSPECIFIED: ".jsonl",
    DataFormat.DATA_FORMAT_JSONL: ".jsonl",
    DataFormat.DATA_FORMAT_PARQUET: ".parquet",
    DataFormat.DATA_FORMAT_ARROW_STREAM: ".arrow",
    DataFormat.DATA_FORMAT_CSV: ".csv",
}


@dataclass
class StoredTraining:
    """What `training.json` holds.

    Args:
        training: As it was accepted; the event log says what became of it.
        assignment: What the worker is told.
        digest: SHA-256 of the request, for retries with the same request_id.
    """

    training: Training
    assignment: StartTrainingRequest
    digest: str


class TrainingStore:
    """Folders of trainings below `<home>/trainings`.

    Args:
        folder: That folder; made when missing.
        output_root: Folder of all results.
    """

    def __init__(self, folder: Path, output_root: Path) -> None:
        self._folder = folder
        self.output_root = output_root
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)

    def folder_of(self, training_id: str) -> Path:
        """The folder of a training."""
        return self._folder / training_id

    def event_log(self, training_id: str) -> Path:
        """The event log of a training."""
        return self.folder_of(training_id) / EVENT_LOG_NAME

    def new_id(self) -> str:
        """An id that sorts by time."""
        return f"training-{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(3)}"

    def free_output_dir(self, name: str, *, explicit: bool, taken: Iterable[str]) -> Path:
        """Returns the folder for the results of a new training.

        Args:
            name: Relative to the output root.
            explicit: The user chose the name; then it is that one or an error.
            taken: Absolute folders of trainings that have not written yet.

        Raises:
            AlreadyExistsError: The user's choice holds results, or will.
        """
        taken = set(taken)
        candidate, number = self.output_root / name, 2
        while str(candidate) in taken or _has_content(candidate):
            if explicit:
                raise AlreadyExistsError(
                    ErrorReason.ERROR_REASON_OUTPUT_DIR_TAKEN,
                    f'output_dir "{name}" holds the results of another training, which are never overwritten. '
                    "Choose another name, or leave it unset for a free one.",
                )
            candidate, number = self.output_root / f"{name}-{number}", number + 1
        return candidate

    def create(self, stored: StoredTraining, train: DatasetSource, evaluation: DatasetSource | None) -> None:
        """Makes the folder: inline rows as files, then training.json last, so that a folder without it is no training.

        Args:
            stored: Its assignment gets the datasets, with paths in place of inline rows.
            train: Rows as asked, paths resolved.
            evaluation: The same for the eval rows.

        Raises:
            ExhaustedError: The disk is full (DISK_FULL). Nothing of the training stays.
        """
        folder = self.folder_of(stored.training.training_id)
        try:
            folder.mkdir(mode=0o700)
            stored.assignment.train_dataset.CopyFrom(_on_disk(train, folder / "train"))
            if evaluation is not None:
                stored.assignment.eval_dataset.CopyFrom(_on_disk(evaluation, folder / "eval"))
            self.save(stored)
        except OSError as error:
            self.remove(stored.training.training_id)
            if error.errno in {errno.ENOSPC, errno.EDQUOT}:
                raise _disk_full(self._folder) from error
            raise

    def remove(self, training_id: str) -> None:
        """Takes back a training that was not accepted after all."""
        shutil.rmtree(self.folder_of(training_id), ignore_errors=True)

    def save(self, stored: StoredTraining) -> None:
        """Replaces training.json in one step."""
        path = self.folder_of(stored.training.training_id) / "training.json"
        temporary = path.with_suffix(".json.tmp")
        content = {
            "version": STATE_VERSION,
            "digest": stored.digest,
            "training": MessageToDict(stored.training, preserving_proto_field_name=True),
            "assignment": MessageToDict(stored.assignment, preserving_proto_field_name=True),
        }
        with temporary.open("w", encoding="utf-8") as stream:
            json.dump(content, stream, indent=1)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)

    def load_all(self) -> list[StoredTraining]:
        """Reads every training, oldest first."""
        return [_read(path) for path in sorted(self._folder.glob("*/training.json"))]


def _read(path: Path) -> StoredTraining:
    content = json.loads(path.read_text(encoding="utf-8"))
    return StoredTraining(
        training=ParseDict(content["training"], Training(), ignore_unknown_fields=True),
        assignment=ParseDict(content["assignment"], StartTrainingRequest(), ignore_unknown_fields=True),
        digest=content["digest"],
    )


def _on_disk(source: DatasetSource, stem: Path) -> DatasetSource:
    if source.WhichOneof("origin") != "inline":
        return source
    path = stem.with_suffix(_SUFFIXES[source.inline.format])
    path.write_bytes(source.inline.data)
    result = DatasetSource()
    result.CopyFrom(source)
    result.path = str(path)
    return result


def without_inline_rows(source: DatasetSource) -> DatasetSource:
    """The source as the API shows it later: the rows themselves are left out."""
    result = DatasetSource()
    result.CopyFrom(source)
    if result.WhichOneof("origin") == "inline":
        result.inline.ClearField("data")
    return result


def _disk_full(folder: Path) -> ExhaustedError:
    return ExhaustedError(
        ErrorReason.ERROR_REASON_DISK_FULL,
        f"The disk that holds {folder} is full, so the training was not accepted. Free some space, then call again.",
    )


def _has_content(folder: Path) -> bool:
    return folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
