"""What the app needs of the outside: worker processes and devices, as it sees them."""

from collections.abc import AsyncIterator
from typing import Protocol

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
        """Ends the process by the bounded stop ladder; returns once it is gone. Repeatable."""
        ...

    async def exited(self) -> WorkerExit:
        """Returns once the process is gone, for whatever reason. Any number of callers may wait."""
        ...


class WorkerLauncher(Protocol):
    """Starts workers."""

    async def launch(self, model_id: str, *, device_map: str) -> Worker:
        """Starts a worker for a model; returns once it answers.

        Raises:
            AbortedError: It died, or did not answer in time (WORKER_DIED, WORKER_UNRESPONSIVE).
        """
        ...


class Devices(Protocol):
    """GPUs of this host, or its CPU."""

    def list(self) -> list[Device]:
        """All devices with their memory now; model_ids are left empty. The CPU alone when there is no GPU."""
        ...
