"""What the app needs of the outside: worker processes, devices and a checker of rows, as it sees them."""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from unslothd.v1.dataset_pb2 import DataFormat
from unslothd.v1.model_pb2 import Model
from unslothd.v1.server_info_pb2 import Device
from unslothd.v1.training_event_pb2 import TrainingEvent
from unslothd.v1.training_pb2 import TrainingPlan
from unslothd.worker.v1 import worker_service_pb2 as worker
from unslothd_server.app.worker_exit import WorkerExit


class Worker(Protocol):
    """One worker process. Calls raise UnslothdError: the worker's own, WORKER_DIED, or WORKER_UNRESPONSIVE."""

    @property
    def model_id(self) -> str:
        """Model that it holds."""
        ...

    def load(self, request: worker.LoadModelRequest) -> AsyncIterator[worker.LoadModelResponse]:
        """Loads the model; the last message carries it."""
        ...

    async def prepare(self, request: worker.PrepareForTrainingRequest) -> Model:
        """Attaches trainable parameters."""
        ...

    async def start_training(self, request: worker.StartTrainingRequest) -> None:
        """Hands a training over."""
        ...

    def watch(self, training_id: str, after_sequence: int) -> AsyncIterator[TrainingEvent]:
        """Events after a sequence, as they come; ends after the terminal event."""
        ...

    async def cancel(self, training_id: str, *, save_checkpoint: bool) -> None:
        """Asks the training to stop at the next step boundary."""
        ...

    async def pause(self, training_id: str) -> None:
        """Asks the training to stop at the next step boundary in a state from which it can go on."""
        ...

    async def plan(self, request: worker.PlanTrainingRequest) -> TrainingPlan:
        """Works out what a training would do; ends when cancelled."""
        ...

    def export(self, request: worker.ExportModelRequest) -> AsyncIterator[worker.ExportModelResponse]:
        """Writes the model in another form; the last message carries the artifact."""
        ...

    def generate(self, request: worker.GenerateRequest) -> AsyncIterator[worker.GenerateResponse]:
        """Streams text."""
        ...

    async def status(self) -> worker.GetStatusResponse:
        """What it is doing now."""
        ...

    async def stop(self) -> WorkerExit:
        """Ends the process by the bounded stop ladder; returns once it is gone. Repeatable.

        Raises:
            WorkerStuckError: Not even SIGKILL ended it in time.
        """
        ...

    async def kill(self) -> WorkerExit:
        """As `stop`, without asking first: it writes nothing more, so that its training can go on elsewhere."""
        ...

    async def detach(self) -> None:
        """Lets go of a worker that shall live on without this server. No call may follow."""
        ...

    async def exited(self) -> WorkerExit:
        """Returns once the process is gone, for whatever reason. Any number of callers may wait."""
        ...


class WorkerLauncher(Protocol):
    """Starts workers."""

    @property
    def has_spare(self) -> bool:
        """True when the next launch takes a process that was started before, and need not be told as a start."""
        ...

    async def launch(self, model_id: str, *, device_map: str) -> Worker:
        """Starts a worker for a model; returns once it answers.

        Raises:
            AbortedError: It died, or did not answer in time (WORKER_DIED, WORKER_UNRESPONSIVE).
        """
        ...


class WarmWorkers(Protocol):
    """Spare workers, which `WorkerLauncher.launch` takes."""

    @property
    def num_ready(self) -> int:
        """Spares whose imports are done."""
        ...

    def keep(self) -> None:
        """Begins to start spares."""
        ...

    async def close(self) -> None:
        """Ends the spares. Launches go on without."""
        ...


class Devices(Protocol):
    """GPUs of this host, or its CPU."""

    def list(self) -> list[Device]:
        """All devices with their memory now; model_ids are left empty. The CPU alone when there is no GPU."""
        ...


@dataclass(frozen=True)
class RowsFound:
    """Rows that can be used.

    Args:
        num_rows: How many, at least 1.
        columns: Their names, in the order of the data.
    """

    num_rows: int
    columns: list[str]


class RowCheck(Protocol):
    """The check of one file that still grows."""

    @property
    def over(self) -> bool:
        """True once the verdict is there: before `end` only when it is bad."""
        ...

    def grown(self, num_bytes: int) -> None:
        """Tells how many bytes of the file are there."""
        ...

    def end(self) -> None:
        """Tells that all bytes are there."""
        ...

    async def verdict(self) -> RowsFound:
        """Waits for what was found.

        Raises:
            DatasetError: DATASET_ROW with a violation for each bad row, DATASET_EMPTY or DATASET_DAMAGED.
        """
        ...

    async def close(self) -> None:
        """Ends the check, whatever it is doing. Repeatable."""
        ...


class RowChecker(Protocol):
    """Starts checks."""

    async def start(self, rows: Path, data_format: "DataFormat.ValueType") -> RowCheck:
        """Starts the check of a file that is still empty. Raises OSError when the host has no room for it."""
        ...
