"""Workers without processes, for tests of the app: they outlive a server object, write real event logs, and can die.

Everything happens when a test says so, on one event loop: a training makes a step, ends or fails by a call, and a stop
is heeded at once, or at the next step while the worker is deaf.
"""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from unslothd.v1.error_reason_pb2 import ErrorReason
from unslothd.v1.model_pb2 import Model
from unslothd.v1.training_event_pb2 import (
    StepProgress,
    TrainingCancelled,
    TrainingEvent,
    TrainingFailed,
    TrainingStarted,
    TrainingStateChanged,
    TrainingSucceeded,
)
from unslothd.v1.training_pb2 import Checkpoint, Training, TrainingPlan
from unslothd.worker.v1 import worker_service_pb2 as pb
from unslothd_server.app.broadcast import WakeUp
from unslothd_server.app.worker_exit import WorkerExit, WorkerStuckError, worker_died
from unslothd_server.errors import ExhaustedError
from unslothd_server.event_log import EVENT_LOG_NAME, EventLogReader, EventLogWriter
from unslothd_server.status import to_status

TOTAL_STEPS = 100


class InMemoryTraining:
    """One training in a worker."""

    def __init__(self, request: pb.StartTrainingRequest) -> None:
        self.request = request
        self.is_over = False
        self.stop = ""
        self.changed = WakeUp()
        self.log = Path(request.training_dir) / EVENT_LOG_NAME
        self._writer = EventLogWriter(self.log)
        assert self._writer.last_sequence + 1 == request.next_sequence
        resume = request.resume_from_checkpoint
        self.step = int(resume.rpartition("-")[2]) if resume else 0
        self.emit(TrainingEvent(state_changed=TrainingStateChanged(state=Training.STATE_RUNNING)))
        plan = TrainingPlan(config=request.config, total_steps=TOTAL_STEPS)
        self.emit(TrainingEvent(started=TrainingStarted(plan=plan, first_step=self.step + 1)))

    def emit(self, event: TrainingEvent) -> None:
        """Appends an event."""
        event.sequence = self._writer.last_sequence + 1
        event.training_id = self.request.training_id
        event.event_time.GetCurrentTime()
        self._writer.append(event)
        self.changed.notify()

    def save(self) -> str:
        """Makes a checkpoint of the last step."""
        folder = Path(self.request.output_dir) / f"checkpoint-{self.step}"
        folder.mkdir(parents=True, exist_ok=True)
        self.emit(TrainingEvent(checkpoint_saved=Checkpoint(step=self.step, path=str(folder))))
        return str(folder)

    def make_step(self) -> None:
        """Makes a step, or heeds the stop that was asked for."""
        if self.stop:
            self.heed()
            return
        self.step += 1
        self.emit(TrainingEvent(step=StepProgress(step=self.step, total_steps=TOTAL_STEPS)))
        self.save()

    def heed(self) -> None:
        """Stops as it was asked."""
        if self.stop == "pause":
            if self.step:
                self.save()
            self.end(TrainingEvent(state_changed=TrainingStateChanged(state=Training.STATE_PAUSED)))
        else:
            self.end(TrainingEvent(cancelled=TrainingCancelled(step=self.step)))

    def succeed(self) -> None:
        """Ends well."""
        final = Path(self.request.output_dir) / "final"
        final.mkdir(parents=True, exist_ok=True)
        self.end(TrainingEvent(succeeded=TrainingSucceeded(output_dir=str(final))))

    def fail(self) -> None:
        """Ends with an error of its own."""
        error = ExhaustedError(ErrorReason.ERROR_REASON_OUT_OF_MEMORY, "Out of memory. Take a smaller batch_size.")
        self.end(TrainingEvent(failed=TrainingFailed(error=to_status(error))))

    def end(self, event: TrainingEvent) -> None:
        """Writes the last event."""
        self.emit(event)
        self.close()

    def close(self) -> None:
        """Writes nothing any more."""
        self.is_over = True
        self._writer.close()
        self.changed.notify()


class InMemoryWorker:
    """What a process would be: it lives on when the server object that started it is gone."""

    def __init__(self, model_id: str) -> None:
        self.model_id = model_id
        self.model: Model | None = None
        self.hub_token = ""
        self.training: InMemoryTraining | None = None
        self.is_deaf = False
        self.is_stuck = False
        self.hangs = False
        self.status_calls = 0
        self.end: asyncio.Future[WorkerExit] = asyncio.get_running_loop().create_future()

    @property
    def active(self) -> InMemoryTraining | None:
        """Its training that is not over."""
        return self.training if self.training is not None and not self.training.is_over else None

    def turn_deaf(self) -> None:
        """Heeds stops at its next step only, as a worker that is deep in one."""
        self.is_deaf = True

    def listen(self) -> None:
        """Heeds stops again, and the one that came meanwhile."""
        self.is_deaf = False
        if self.active is not None and self.active.stop:
            self.active.heed()

    def die(self, *, asked: bool = False) -> None:
        """Is gone."""
        if not self.end.done():
            self.end.set_result(WorkerExit(0 if asked else None, None if asked else "SIGKILL", "", asked))
        if self.active is not None:
            self.active.close()


class Grip:
    """One server's handle on a worker: implements `app.ports.Worker`. A killed server's calls never come back."""

    def __init__(self, host: "InMemoryHost", worker: InMemoryWorker) -> None:
        self._host = host
        self._generation = host.generation
        self.worker = worker
        self.model_id = worker.model_id

    async def _reach(self) -> InMemoryWorker:
        await asyncio.sleep(0)
        await self._fence()
        if self.worker.end.done():
            raise worker_died(self.model_id, self.worker.end.result())
        return self.worker

    async def _fence(self) -> None:
        if self._generation != self._host.generation:
            await asyncio.Event().wait()

    async def load(self, request: pb.LoadModelRequest) -> AsyncIterator[pb.LoadModelResponse]:
        """Loads at once, or when the host lets loads go on."""
        await self._host.loads.wait()
        worker = await self._reach()
        worker.model = Model(model_name=request.model_name, device="cpu", max_seq_length=request.max_seq_length)
        worker.hub_token = request.token
        worker.model.memory_bytes = self._host.memory_bytes
        yield pb.LoadModelResponse(model=worker.model)

    async def prepare(self, request: pb.PrepareForTrainingRequest) -> Model:
        """Prepares."""
        worker = await self._reach()
        assert worker.model is not None
        worker.model.trainable_params = 1
        worker.model.lora.r = 16
        return worker.model

    async def start_training(self, request: pb.StartTrainingRequest) -> None:
        """Takes a training; there must be no other one."""
        worker = await self._reach()
        assert worker.active is None, "two trainings on one worker"
        worker.training = InMemoryTraining(request)

    async def watch(self, training_id: str, after_sequence: int) -> AsyncIterator[TrainingEvent]:
        """The events, up to the last one or the worker's death."""
        training = (await self._reach()).training
        assert training is not None
        assert training.request.training_id == training_id
        reader, sequence = EventLogReader(training.log), after_sequence
        while True:
            for entry in reader.read(sequence):
                await self._fence()
                sequence = entry.event.sequence
                yield entry.event
            if training.is_over:
                await self._reach()
                return
            await training.changed.wait()
            await self._fence()

    async def cancel(self, training_id: str, *, save_checkpoint: bool) -> None:
        """Stops now, or at the next step of a deaf worker."""
        await self._stop_training("cancel")

    async def pause(self, training_id: str) -> None:
        """As `cancel`, to go on later."""
        training = (await self._reach()).active
        if training is not None and not training.stop:
            training.emit(TrainingEvent(state_changed=TrainingStateChanged(state=Training.STATE_PAUSING)))
            await self._stop_training("pause")

    async def _stop_training(self, how: str) -> None:
        worker = await self._reach()
        if worker.active is not None:
            worker.active.stop = how
            if not worker.is_deaf:
                worker.active.heed()

    async def status(self) -> pb.GetStatusResponse:
        """What it is doing."""
        worker = await self._reach()
        worker.status_calls += 1
        status = pb.GetStatusResponse(training_active=worker.active is not None)
        status.seconds_since_progress = 3600 if worker.hangs else 0
        if worker.model is not None:
            status.model.CopyFrom(worker.model)
        if worker.training is not None:
            status.training_id = worker.training.request.training_id
        return status

    async def stop(self) -> WorkerExit:
        """Ends it, unless it is stuck; as a real one does, it first ends its training, as cancelled if nobody asked."""
        await self._fence()
        training = self.worker.active
        if training is not None and not self.worker.is_stuck and not self.worker.is_deaf:
            training.stop = training.stop or "cancel"
            training.heed()
        return await self.kill()

    async def kill(self) -> WorkerExit:
        """Ends it at once, unless it is stuck."""
        await self._fence()
        if self.worker.is_stuck:
            raise WorkerStuckError(self.model_id, 4711)
        self.worker.die(asked=True)
        return await self.exited()

    async def detach(self) -> None:
        """Nothing to let go of."""

    async def exited(self) -> WorkerExit:
        """Waits for its end."""
        end = await asyncio.shield(self.worker.end)
        await self._fence()
        return end


class InMemoryHost:
    """Where workers live: implements `app.ports.WorkerLauncher` for one server object after the other."""

    has_spare = False

    def __init__(self) -> None:
        self.generation = 0
        self.workers: list[InMemoryWorker] = []
        self.memory_bytes = 0
        self.loads = asyncio.Event()
        self.loads.set()

    @property
    def living(self) -> list[InMemoryWorker]:
        """Workers that are not gone."""
        return [worker for worker in self.workers if not worker.end.done()]

    async def launch(self, model_id: str, *, device_map: str) -> Any:
        """Starts a worker; a leftover of the same model is ended first, as a real launcher does."""
        for leftover in self.living:
            if leftover.model_id == model_id:
                await Grip(self, leftover).stop()
        worker = InMemoryWorker(model_id)
        self.workers.append(worker)
        return Grip(self, worker)

    def attach_living(self) -> list[Any]:
        """Handles for a server that starts."""
        return [Grip(self, worker) for worker in self.living]
