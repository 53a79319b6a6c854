"""The app over workers without processes: a server that is started, used, killed and started again in milliseconds."""

import asyncio
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from doubles.in_memory_workers import InMemoryHost, InMemoryTraining, InMemoryWorker
from unslothd.v1.dataset_pb2 import DatasetSource, InlineRows
from unslothd.v1.model_pb2 import Model
from unslothd.v1.server_info_pb2 import Device
from unslothd.v1.service_pb2 import LoadModelRequest, PrepareForTrainingRequest, ResumeTrainingRequest, TrainRequest
from unslothd.v1.training_event_pb2 import TrainingEvent
from unslothd.v1.training_pb2 import Training
from unslothd_server.app.dataset_sources import StoredRows
from unslothd_server.app.memory_admission import MemoryAdmission
from unslothd_server.app.model_lifecycle import ModelLifecycle
from unslothd_server.app.model_recovery import ModelRecovery
from unslothd_server.app.model_store import ModelStore
from unslothd_server.app.model_workers import ModelWorkers
from unslothd_server.app.models import Models
from unslothd_server.app.paths import AllowedRoots
from unslothd_server.app.training_acceptance import TrainingAcceptance
from unslothd_server.app.training_control import TrainingControl
from unslothd_server.app.training_queues import TrainingQueues
from unslothd_server.app.training_recovery import TrainingRecovery
from unslothd_server.app.training_run import TrainingRun
from unslothd_server.app.training_store import TrainingStore
from unslothd_server.app.trainings import Trainings
from unslothd_server.event_log import EventLogReader

_BOUND_SECONDS = 20


class OneDevice:
    """A device whose memory is what a test says, in bytes."""

    def __init__(self, free: int = 1 << 40, total: int = 1 << 40) -> None:
        self.free = free
        self.total = total

    def list(self) -> list[Device]:
        """The device."""
        return [Device(device="cpu", total_memory_bytes=self.total, free_memory_bytes=self.free)]


def write_model(folder: Path, num_bytes: int = 0) -> None:
    """A model folder; with `num_bytes`, one whose weights have so many bytes in 16 bits, by their header."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    if num_bytes:
        header = json.dumps({"w": {"dtype": "BF16", "shape": [num_bytes // 2, 1], "data_offsets": [0, 0]}}).encode()
        (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)


class AppInMemory:
    """Models and trainings of one home, over a host of in-memory workers.

    Args:
        folder: Holds everything; models lie below `folder / "roots"`.
        device: What there is to load onto.
        hub_token: The operator's.
        stall_seconds: After which a training counts as hung.
        rows_of: Finds uploaded datasets.
    """

    def __init__(
        self,
        folder: Path,
        device: OneDevice | None = None,
        *,
        hub_token: str = "",
        stall_seconds: float = 3600,
        rows_of: StoredRows = Path,
    ) -> None:
        self._folder = folder
        self.device = device or OneDevice()
        self._hub_token = hub_token
        self._stall_seconds = stall_seconds
        self._rows_of = rows_of
        self.host = InMemoryHost()

    async def start(self) -> None:
        """Starts a server on what is there."""
        roots = AllowedRoots([self._folder / "roots"])
        store = ModelStore(self._folder / "models")
        admission = MemoryAdmission(self.device)
        workers = ModelWorkers(cast("Any", self.host), admission, store, hub_token=self._hub_token)
        self.models = Models(store, admission, self.device, max_loaded=3)
        training_store = TrainingStore(self._folder / "trainings", self._folder / "output")
        self.trainings = Trainings(training_store, heartbeat_seconds=3600)
        queues = TrainingQueues(self.models, workers, stall_seconds=self._stall_seconds)
        self.acceptance = TrainingAcceptance(
            self.trainings, queues, self.models, training_store, roots, self._rows_of, max_queued=5
        )
        self.control = TrainingControl(self.trainings, queues, self.models, workers)
        self.lifecycle = ModelLifecycle(self.models, workers, store, roots, self.trainings.result_of)
        self.trainings.read_all()
        recovery = ModelRecovery(self.models, workers, self.lifecycle, store)
        await recovery.recover(self.host.attach_living(), self.trainings.newest_result)
        await TrainingRecovery(self.trainings, queues, self.models, workers).recover()

    async def kill_and_start(self, *, workers: bool = False) -> None:
        """Kills the server, and its workers too if that is asked; then another one starts."""
        self.host.generation += 1  # its calls never come back, so that its tasks do nothing any more
        for worker in self.host.living if workers else ():
            worker.die()
        await self.start()

    async def prepared_model(self) -> str:
        """Loads the model "m" and prepares it; returns its id."""
        *_, last = [each async for each in self.lifecycle.load(LoadModelRequest(model_name="m", dtype="bfloat16"))]
        await self.lifecycle.prepare(PrepareForTrainingRequest(model_id=last.model.model_id))
        return last.model.model_id

    def train(self, model_id: str) -> TrainingRun:
        """Begins a training."""
        rows = DatasetSource(inline=InlineRows(data=b"{}"))
        return self.acceptance.accept(TrainRequest(model_id=model_id, train_dataset=rows))

    async def at_step(self, run: TrainingRun, step: int) -> InMemoryTraining:
        """Lets a training make steps up to this one; returns what its worker has of it."""
        training = await self.in_worker(run)
        while training.step < step:
            training.make_step()
        await until(lambda: run.training.step == step)
        return training

    async def in_worker(self, run: TrainingRun) -> InMemoryTraining:
        """What a worker has of a training, once one has it."""
        await until(lambda: self._found(run) is not None)
        found = self._found(run)
        assert found is not None
        return found

    def _found(self, run: TrainingRun) -> InMemoryTraining | None:
        for worker in self.host.living:
            if worker.active is not None and worker.active.request.training_id == run.training_id:
                return worker.active
        return None

    def resume(self, run: TrainingRun) -> Training:
        """Resumes a training."""
        return self.control.resume(ResumeTrainingRequest(training_id=run.training_id))

    def run_of(self, run: TrainingRun) -> TrainingRun:
        """The same training in the server of now."""
        return self.trainings.get(run.training_id)

    @property
    def worker(self) -> InMemoryWorker:
        """The one worker that lives."""
        (worker,) = self.host.living
        return worker

    async def state_of(self, model_id: str) -> "Model.State.ValueType":
        """State of a model."""
        return (await self.models.describe(model_id)).state


def events(run: TrainingRun) -> list[TrainingEvent]:
    """What is in the log of a training."""
    return [entry.event for entry in EventLogReader(run.store.event_log(run.training_id)).read()]


def warnings(run: TrainingRun) -> list[str]:
    """Reasons of the warnings in its log."""
    return [event.warning.reason for event in events(run) if event.HasField("warning")]


async def until(holds: Callable[[], bool]) -> None:
    """Lets the loop run until something holds."""
    async with asyncio.timeout(_BOUND_SECONDS):
        while not holds():  # noqa: ASYNC110 - whatever it is that is waited for
            await asyncio.sleep(0)
