"""What tests of worker processes share: a home, a prepared worker, a scripted training, bounded waits."""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any

from doubles.fake_worker import fake_row, fake_worker_command
from unslothd.v1.dataset_pb2 import DatasetSource
from unslothd.v1.training_event_pb2 import TrainingEvent
from unslothd.v1.training_pb2 import TrainingConfig
from unslothd.worker.v1 import worker_service_pb2 as messages
from unslothd_server.workers.channel import WorkerProcess
from unslothd_server.workers.launcher import LocalLauncher
from unslothd_server.workers.timeouts import WorkerTimeouts

# Long enough for a busy machine where a rung must not be left early, short where it must be.
PATIENT = WorkerTimeouts()
HASTY = WorkerTimeouts(end_in_order=0.5, end_on_sigterm=0.3, end_on_sigkill=20, answer=5)

LOAD = messages.LoadModelRequest(model_name="fake", source="fake", max_seq_length=64)


def bounded(test: Coroutine[Any, Any, None], seconds: float = 60) -> None:
    """Runs a test's coroutine; it fails when it takes longer."""

    async def timed() -> None:
        async with asyncio.timeout(seconds):
            await test

    asyncio.run(timed())


async def until(condition: Callable[[], bool]) -> None:
    """Returns once the condition holds; `bounded` is the limit."""
    while not condition():  # noqa: ASYNC110 - another process makes it true
        await asyncio.sleep(0.01)


async def raised_by(call: Awaitable[Any]) -> BaseException:
    """Returns what the call raises."""
    try:
        await call
    except Exception as error:  # noqa: BLE001 - whatever it is, the test looks at it
        return error
    raise AssertionError("nothing was raised")


class Home:
    """A server's home in which workers are started."""

    def __init__(self, path: Path, scratch: Path) -> None:
        self.path = path
        self.scratch = scratch

    def launcher(self, *, timeouts: WorkerTimeouts = PATIENT, **knobs: Any) -> LocalLauncher:
        """Returns a launcher of doubles with these knobs of the process."""
        return LocalLauncher(self.path, command=fake_worker_command(**knobs), timeouts=timeouts)

    async def loaded(self, model_id: str = "m", *, timeouts: WorkerTimeouts = PATIENT, **knobs: Any) -> WorkerProcess:
        """Returns a worker whose model is loaded."""
        worker = await self.launcher(timeouts=timeouts, **knobs).launch(model_id, device_map="auto")
        async for _ in worker.load(LOAD):
            pass
        return worker

    async def prepared(self, model_id: str = "m", **options: Any) -> WorkerProcess:
        """Returns a worker whose model is loaded and prepared."""
        worker = await self.loaded(model_id, **options)
        await worker.prepare(messages.PrepareForTrainingRequest())
        return worker

    def training(self, training_id: str = "t", *, config: TrainingConfig | None = None, **knobs: Any):
        """Returns a request for a training that follows these knobs."""
        folder = self.path / "trainings" / training_id
        folder.mkdir(parents=True, exist_ok=True)
        rows = self.scratch / f"{training_id}.jsonl"
        rows.write_text(fake_row(**knobs))
        return messages.StartTrainingRequest(
            training_id=training_id,
            training_dir=str(folder),
            next_sequence=1,
            config=config or TrainingConfig(),
            train_dataset=DatasetSource(path=str(rows)),
            output_dir=str(self.scratch / "out" / training_id),
        )

    def log_of(self, model_id: str = "m") -> str:
        """Returns what a living worker wrote to its log."""
        return (self.path / "workers" / model_id / "worker.log").read_text()


async def events_of(worker: WorkerProcess, training_id: str = "t", after: int = 0) -> list[TrainingEvent]:
    """Returns the events of a training up to its end."""
    return [event async for event in worker.watch(training_id, after)]


async def trained(worker: WorkerProcess, request: messages.StartTrainingRequest) -> list[TrainingEvent]:
    """Hands a training over and returns its events."""
    await worker.start_training(request)
    return await events_of(worker, request.training_id)


async def at_step(worker: WorkerProcess, step: int, training_id: str = "t") -> None:
    """Returns once the event of that step is there."""
    async for event in worker.watch(training_id, 0):
        if event.step.step >= step:
            return


def kinds(events: list[TrainingEvent]) -> list[str | None]:
    """Names the events' kinds."""
    return [event.WhichOneof("kind") for event in events]
