"""A model that the server knows: what the API shows of it, the worker that holds it, and how to make it again."""

import asyncio
from dataclasses import dataclass, field
from typing import Literal

from unslothd.v1.error_reason_pb2 import ErrorReason
from unslothd.v1.model_pb2 import LoadProgress, Model
from unslothd.v1.training_pb2 import TrainingConfig
from unslothd_server.app.broadcast import Broadcast
from unslothd_server.app.memory_reading import MemoryReading
from unslothd_server.app.model_store import StoredModel
from unslothd_server.app.ports import Worker
from unslothd_server.errors import ExhaustedError, PreconditionError, UnslothdError


@dataclass
class LoadedModel:
    """A model and the worker that holds it.

    Args:
        stored: What is on disk about it: how it was loaded and prepared. `stored.model` is what the API shows.
        progress: Of its first loading; closed when that is over.
        worker: None until it answers, and while the model is suspended or its worker is dead.
        lock: Held by whoever changes the model: prepare and unload.
        failure: Why it is FAILED.
        bringing_up: Set while a worker is started for it, or waits for memory; what went wrong is its result.
        lacks_memory: How far it is from fitting, while it waits for memory.
        memory: Asks the worker what memory it holds.
    """

    stored: StoredModel
    progress: Broadcast[LoadProgress] = field(default_factory=Broadcast[LoadProgress])
    worker: Worker | None = None
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    failure: UnslothdError | None = None
    bringing_up: "asyncio.Task[Exception | None] | None" = None
    lacks_memory: ExhaustedError | None = None
    watch: "asyncio.Task[None] | None" = None
    memory: MemoryReading = field(default_factory=MemoryReading)

    @property
    def model(self) -> Model:
        """The model as the API shows it; memory_bytes as last heard."""
        return self.stored.model

    @property
    def model_id(self) -> str:
        """The id of the model."""
        return self.stored.model.model_id

    @property
    def prepared_config(self) -> TrainingConfig:
        """What PrepareForTraining was given, without defaults."""
        return self.stored.prepared_config

    @property
    def needs_worker(self) -> bool:
        """True when it has no living worker, and none is being started."""
        return self.bringing_up is None and (self.worker is None or self.failure is not None)

    def require_worker(self) -> Worker:
        """Returns the worker of a loaded model.

        Raises:
            UnslothdError: What made it fail, or MODEL_NOT_READY while it loads, unloads or is suspended.
        """
        if self.failure is not None:
            raise self.failure
        if self.model.state == Model.STATE_SUSPENDED:
            raise PreconditionError(
                ErrorReason.ERROR_REASON_MODEL_NOT_READY,
                f'Model "{self.model_id}" is suspended: its worker was ended to free the device. ResumeTraining of its '
                "paused training brings it back, and so does another Train.",
            )
        if self.worker is None or self.model.state in {Model.STATE_LOADING, Model.STATE_UNLOADING}:
            state = Model.State.Name(self.model.state).removeprefix("STATE_").lower()
            raise PreconditionError(
                ErrorReason.ERROR_REASON_MODEL_NOT_READY,
                f'Model "{self.model_id}" is {state}; wait until GetModel shows it READY.',
            )
        return self.worker

    def idle_worker(self, what: str) -> Worker:
        """Returns the worker of a loaded model that no training runs on.

        Args:
            what: What the caller wants to do, for the error: "generate".

        Raises:
            UnslothdError: As `require_worker`, or MODEL_BUSY.
        """
        worker = self.require_worker()
        if self.model.state == Model.STATE_TRAINING:
            raise PreconditionError(
                ErrorReason.ERROR_REASON_MODEL_BUSY,
                f'Training "{self.model.active_training_id}" runs on "{self.model_id}"; {what} when it is over '
                "(WatchTraining), or stop it (CancelTraining).",
            )
        return worker


# Fields of Model that the registry knows; all others are the engine's to say.
_OURS: tuple[Literal["model_id", "model_name", "state", "load_time", "active_training_id", "device_map"], ...] = (
    "model_id",
    "model_name",
    "state",
    "load_time",
    "active_training_id",
    "device_map",
)


def take_over(model: Model, from_worker: Model) -> None:
    """Copies what the engine knows about the model; the rest is the registry's own."""
    ours = Model()
    ours.CopyFrom(model)
    model.CopyFrom(from_worker)
    for name in _OURS:
        model.ClearField(name)
    model.MergeFrom(
        Model(
            model_id=ours.model_id,
            model_name=ours.model_name,
            state=ours.state,
            load_time=ours.load_time if ours.HasField("load_time") else None,
            active_training_id=ours.active_training_id,
            device_map=ours.device_map,
        )
    )
