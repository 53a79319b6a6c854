"""The folder of each training: what was asked, its event log, and its place on disk among the results."""

import secrets
import shutil
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Any

from google.protobuf.json_format import MessageToDict, ParseDict

from unslothd.v1.dataset_pb2 import DataFormat, DatasetSource
from unslothd.v1.error_reason_pb2 import ErrorReason
from unslothd.v1.training_pb2 import Training
from unslothd.worker.v1.worker_service_pb2 import StartTrainingRequest
from unslothd_server import disk
from unslothd_server.app.files import read_or_set_aside, write_json
from unslothd_server.app.model_store import StoredModel
from unslothd_server.app.paths import AllowedRoots, has_content
from unslothd_server.errors import AlreadyExistsError, UnslothdError
from unslothd_server.event_log import EVENT_LOG_NAME

STATE_VERSION = 2  # 1 had no model, wish and resume_at_most
FINAL = "final"

_SUFFIXES = {
    DataFormat.DATA_FORMAT_UNSPECIFIED: ".jsonl",
    DataFormat.DATA_FORMAT_JSONL: ".jsonl",
    DataFormat.DATA_FORMAT_PARQUET: ".parquet",
    DataFormat.DATA_FORMAT_ARROW_STREAM: ".arrow",
    DataFormat.DATA_FORMAT_CSV: ".csv",
}


class StopWish(StrEnum):
    """How a training was asked to stop. The server keeps it until it is done."""

    NONE = "none"
    PAUSE = "pause"
    CANCEL = "cancel"
    CANCEL_SAVING = "cancel_saving"

    @property
    def weight(self) -> int:
        """A wish replaces those of less weight."""
        return list(StopWish).index(self)

    @property
    def is_cancel(self) -> bool:
        """True when it shall not go on."""
        return self in {StopWish.CANCEL, StopWish.CANCEL_SAVING}


@dataclass
class StoredTraining:
    """What `training.json` holds.

    Args:
        training: As it was accepted; the event log says what became of it.
        assignment: What the worker is told.
        digest: SHA-256 of the request, for retries with the same request_id.
        model: How its model was made, for when that has to be made again; None in files of version 1.
        wish: How it was asked to stop.
        resume_at_most: Step of the checkpoint that ResumeTraining chose; 0 = the newest.
        resume_on_start: It was paused by the end of a server, and the next one goes on with it.
    """

    training: Training
    assignment: StartTrainingRequest
    digest: str
    model: StoredModel | None
    wish: StopWish = StopWish.NONE
    resume_at_most: int = 0
    resume_on_start: bool = False


@dataclass(frozen=True)
class TrainingDraft:
    """A training that nothing is on disk of yet.

    Args:
        training: As the API will show it.
        assignment: What the worker is told, without datasets.
        train_dataset: Rows to train on, paths resolved, inline rows still inside.
        eval_dataset: The same for the eval rows; None = none.
        model: How its model was made.
    """

    training: Training
    assignment: StartTrainingRequest
    train_dataset: DatasetSource
    eval_dataset: DatasetSource | None
    model: StoredModel


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
        for leftover in folder.glob(".plan-*"):
            shutil.rmtree(leftover, ignore_errors=True)

    def folder_of(self, training_id: str) -> Path:
        """The folder of a training."""
        return self._folder / training_id

    def event_log(self, training_id: str) -> Path:
        """The event log of a training."""
        return self.folder_of(training_id) / EVENT_LOG_NAME

    def new_id(self) -> str:
        """An id that sorts by time, to the millisecond."""
        moment = datetime.now(UTC)
        return f"training-{moment:%Y%m%d-%H%M%S}-{moment.microsecond // 1000:03x}{secrets.token_hex(2)[:3]}"

    def free_output_dir(self, name: str, *, explicit: bool, taken: Iterable[str]) -> Path:
        """Returns the folder for the results of a new training.

        Args:
            name: Relative to the output root.
            explicit: The user chose the name; then it is that one or an error.
            taken: Absolute folders of trainings that have not written yet.

        Raises:
            AlreadyExistsError: The user's choice holds results, or will.
            PermissionDeniedError: A link leads out of the output root (PATH_NOT_ALLOWED).
        """
        taken = set(taken)
        candidate, number = self.output_root / name, 2
        AllowedRoots([self.output_root]).check(candidate)
        while str(candidate) in taken or has_content(candidate):
            if explicit:
                raise AlreadyExistsError(
                    ErrorReason.ERROR_REASON_OUTPUT_DIR_TAKEN,
                    f'output_dir "{name}" holds the results of another training, which are never overwritten. '
                    "Choose another name, or leave it unset for a free one.",
                )
            candidate, number = self.output_root / f"{name}-{number}", number + 1
        return candidate

    def create(self, draft: TrainingDraft, digest: str) -> StoredTraining:
        """Makes the folder: inline rows as files, then training.json last, so that a folder without it is no training.

        Args:
            draft: What is accepted.
            digest: SHA-256 of the request.

        Raises:
            UnslothdError: The disk takes no more (DISK_FULL, NOT_WRITABLE). Nothing of the training stays.
        """
        folder = self.folder_of(draft.training.training_id)
        try:
            with disk.telling(self._folder, "call again: the training was not accepted"):
                folder.mkdir(mode=0o700)
                stored = StoredTraining(draft.training, _with_rows(draft, folder), digest, draft.model)
                self.save(stored)
        except (UnslothdError, OSError):
            self.remove(draft.training.training_id)
            raise
        return stored

    @contextmanager
    def scratch(self, draft: TrainingDraft) -> Generator[StartTrainingRequest]:
        """The assignment of a draft that is only looked at; its inline rows are files inside the block."""
        folder = self._folder / f".plan-{draft.training.training_id}"
        try:
            folder.mkdir(mode=0o700)
            yield _with_rows(draft, folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def remove(self, training_id: str) -> None:
        """Takes back a training that was not accepted after all."""
        shutil.rmtree(self.folder_of(training_id), ignore_errors=True)

    def save(self, stored: StoredTraining) -> None:
        """Replaces training.json in one step.

        Raises:
            UnslothdError: The disk takes no more (DISK_FULL, NOT_WRITABLE). The file is as it was.
        """
        content = {
            "version": STATE_VERSION,
            "digest": stored.digest,
            "training": MessageToDict(stored.training, preserving_proto_field_name=True),
            "assignment": MessageToDict(stored.assignment, preserving_proto_field_name=True),
            "model": None if stored.model is None else stored.model.to_json(),
            "wish": stored.wish.value,
            "resume_at_most": stored.resume_at_most,
            "resume_on_start": stored.resume_on_start,
        }
        with disk.telling(self._folder, "call again"):
            write_json(self.folder_of(stored.training.training_id) / "training.json", content)

    def load_all(self) -> list[StoredTraining]:
        """Reads every training, oldest first. A file that cannot be read is set aside."""
        read = [read_or_set_aside(path, _parsed) for path in sorted(self._folder.glob("*/training.json"))]
        return [stored for stored in read if stored is not None]


def _parsed(content: dict[str, Any]) -> StoredTraining:
    model = content.get("model")
    return StoredTraining(
        training=ParseDict(content["training"], Training(), ignore_unknown_fields=True),
        assignment=ParseDict(content["assignment"], StartTrainingRequest(), ignore_unknown_fields=True),
        digest=content["digest"],
        model=None if model is None else StoredModel.from_json(model),
        wish=StopWish(content.get("wish", StopWish.NONE)),
        resume_at_most=content.get("resume_at_most", 0),
        resume_on_start=content.get("resume_on_start", False),
    )


def _with_rows(draft: TrainingDraft, folder: Path) -> StartTrainingRequest:
    """The assignment with its datasets; inline rows become files in the folder."""
    assignment = StartTrainingRequest()
    assignment.CopyFrom(draft.assignment)
    assignment.train_dataset.CopyFrom(_on_disk(draft.train_dataset, folder / "train"))
    if draft.eval_dataset is not None:
        assignment.eval_dataset.CopyFrom(_on_disk(draft.eval_dataset, folder / "eval"))
    return assignment


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
