"""What is kept on disk of each loaded model, so that it can be made again: after a pause, a death or a restart."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import structlog
from google.protobuf.json_format import MessageToDict, ParseDict
from google.protobuf.message import Message

from unslothd.v1.model_pb2 import Model
from unslothd.v1.service_pb2 import LoadModelRequest
from unslothd.v1.training_pb2 import TrainingConfig
from unslothd.worker.v1 import worker_service_pb2 as worker_pb2
from unslothd_server import disk
from unslothd_server.app.files import read_or_set_aside, write_json
from unslothd_server.app.sources import ModelSource
from unslothd_server.errors import UnslothdError

log = structlog.get_logger()

STATE_VERSION = 1

MessageT = TypeVar("MessageT", bound=Message)


@dataclass
class StoredModel:
    """How a model was made.

    Args:
        model: As the API showed it last.
        request: As it was asked for, without the token, which is never stored.
        source: Hub id, or absolute path of a folder or .gguf file.
        prepare: What the worker was told to attach, every field set; None before PrepareForTraining. Its weights_from
            is the folder of the last results on this model, which a new worker has to start from.
        prepared_config: What PrepareForTraining was given, without defaults.
        digest: SHA-256 of the request, for retries with the same request_id.
        suspended: Its training is paused.
        unloading: UnloadModel was asked for.
    """

    model: Model
    request: LoadModelRequest
    source: str
    prepare: worker_pb2.PrepareForTrainingRequest | None = None
    prepared_config: TrainingConfig = field(default_factory=TrainingConfig)
    digest: str = ""
    suspended: bool = False
    unloading: bool = False

    @property
    def model_source(self) -> ModelSource:
        """The source, as memory admission looks at it."""
        path = Path(self.source)
        return ModelSource(self.source, path if path.is_absolute() else None, base_id="")

    def worker_load(self, token: str = "") -> worker_pb2.LoadModelRequest:
        """What a worker is told to load."""
        request = self.request
        return worker_pb2.LoadModelRequest(
            model_name=request.model_name,
            source=self.source,
            max_seq_length=self.model.max_seq_length,
            load_in_4bit=request.load_in_4bit if request.HasField("load_in_4bit") else None,
            token=token,
            dtype=request.dtype,
            revision=request.revision,
            full_finetuning=request.full_finetuning,
        )

    def same_making(self, other: "StoredModel") -> bool:
        """True when both were loaded and prepared alike, whatever has been trained since."""
        return (self.source, self.worker_load(), _without_weights(self.prepare)) == (
            other.source,
            other.worker_load(),
            _without_weights(other.prepare),
        )

    def copy(self) -> "StoredModel":
        """A copy that shares nothing with this one."""
        return StoredModel.from_json(self.to_json())

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {
            "model": _to_dict(self.model),
            "request": _to_dict(self.request),
            "source": self.source,
            "prepare": None if self.prepare is None else _to_dict(self.prepare),
            "prepared_config": _to_dict(self.prepared_config),
            "digest": self.digest,
            "suspended": self.suspended,
            "unloading": self.unloading,
        }

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "StoredModel":
        """The opposite of `to_json`; fields of newer versions are skipped."""
        prepare = content["prepare"]
        return cls(
            model=_parse(content["model"], Model()),
            request=_parse(content["request"], LoadModelRequest()),
            source=content["source"],
            prepare=None if prepare is None else _parse(prepare, worker_pb2.PrepareForTrainingRequest()),
            prepared_config=_parse(content["prepared_config"], TrainingConfig()),
            digest=content["digest"],
            suspended=content["suspended"],
            unloading=content["unloading"],
        )


class ModelStore:
    """Files of models below `<home>/models`.

    Args:
        folder: That folder; made when missing.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)

    def save(self, stored: StoredModel) -> None:
        """Replaces the file of a model in one step.

        Raises:
            UnslothdError: The disk takes no more (DISK_FULL, NOT_WRITABLE). The file is as it was.
        """
        with disk.telling(self._folder, "call again"):
            write_json(self._path(stored.model.model_id), {"version": STATE_VERSION, **stored.to_json()})

    def keep(self, stored: StoredModel) -> None:
        """As `save`, where nobody can be refused any more: what cannot be written now is written with the next save."""
        try:
            self.save(stored)
        except (UnslothdError, OSError) as error:
            log.warning("a model's state cannot be written", model_id=stored.model.model_id, error=str(error))

    def remove(self, model_id: str) -> None:
        """Forgets a model. Repeatable. Of a read-only disk it comes back at the next start."""
        try:
            self._path(model_id).unlink(missing_ok=True)
        except OSError as error:
            log.warning("a model's state cannot be removed", model_id=model_id, error=str(error))

    def load_all(self) -> list[StoredModel]:
        """Reads every model, in the order of their loading. A file that cannot be read is set aside."""
        read = [read_or_set_aside(path, StoredModel.from_json) for path in self._folder.glob("*.json")]
        found = [stored for stored in read if stored is not None]
        return sorted(found, key=lambda each: each.model.load_time.ToNanoseconds())

    def _path(self, model_id: str) -> Path:
        return self._folder / f"{model_id}.json"


def _without_weights(prepare: worker_pb2.PrepareForTrainingRequest | None) -> worker_pb2.PrepareForTrainingRequest:
    result = worker_pb2.PrepareForTrainingRequest()
    if prepare is not None:
        result.CopyFrom(prepare)
    result.ClearField("weights_from")
    return result


def _to_dict(message: Message) -> dict[str, Any]:
    return MessageToDict(message, preserving_proto_field_name=True)


def _parse(content: dict[str, Any], message: MessageT) -> MessageT:
    return ParseDict(content, message, ignore_unknown_fields=True)
