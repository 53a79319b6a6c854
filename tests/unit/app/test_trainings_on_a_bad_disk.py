"""Trainings when the server's own disk lets it down: no half-made folder, no training that hangs."""

import asyncio
import errno
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, NamedTuple, cast

import pytest

from unslothd.v1.dataset_pb2 import DatasetSource, InlineRows
from unslothd.v1.error_reason_pb2 import ErrorReason
from unslothd.v1.model_pb2 import Model
from unslothd.v1.service_pb2 import LoadModelRequest, TrainRequest, WatchTrainingResponse
from unslothd.v1.training_event_pb2 import TrainingEvent, TrainingWarning
from unslothd.v1.training_pb2 import Training
from unslothd.worker.v1.worker_service_pb2 import (
    GetStatusResponse,
    PrepareForTrainingRequest,
    StartTrainingRequest,
)
from unslothd_server.app.loaded_model import LoadedModel
from unslothd_server.app.model_store import StoredModel
from unslothd_server.app.model_workers import ModelWorkers
from unslothd_server.app.models import Models
from unslothd_server.app.paths import AllowedRoots
from unslothd_server.app.training_acceptance import TrainingAcceptance
from unslothd_server.app.training_queues import TrainingQueues
from unslothd_server.app.training_store import StopWish, TrainingStore
from unslothd_server.app.trainings import Trainings
from unslothd_server.errors import ExhaustedError
from unslothd_server.event_log import EventLogReader

REQUEST = TrainRequest(model_id="m", train_dataset=DatasetSource(inline=InlineRows(data=b"{}")), request_id="r")


class BrokenWorker:
    """Breaks with an error that nobody foresaw."""

    async def start_training(self, request: object) -> None:
        raise RuntimeError("nobody foresaw this")


class FullDisk:
    """Takes nothing while it is full: neither an event nor a file of state."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.is_full = False
        real_write, real_fsync = os.write, os.fsync

        def write(file: int, data: bytes) -> int:
            self._refuse()
            return real_write(file, data)

        def fsync(file: int) -> None:
            self._refuse()
            real_fsync(file)

        monkeypatch.setattr(os, "write", write)
        monkeypatch.setattr(os, "fsync", fsync)

    def _refuse(self) -> None:
        if self.is_full:
            raise OSError(errno.ENOSPC, "No space left on device")


class OneModel:
    """A registry with one prepared model, and what is done to its worker."""

    is_closing = False

    def __init__(self) -> None:
        model = Model(model_id="m", state=Model.STATE_PREPARED)
        stored = StoredModel(model, LoadModelRequest(), "tiny", prepare=PrepareForTrainingRequest())
        self.put_away_count = 0
        self.entry = LoadedModel(stored, worker=cast("Any", BrokenWorker()))

    def get(self, model_id: str) -> LoadedModel:
        return self.entry

    async def put_away(self, entry: LoadedModel, *, at_once: bool = False) -> None:
        self.put_away_count += 1

    def start_from(self, entry: LoadedModel, folder: Path | None) -> None:
        assert folder is None  # nothing was learnt


class Parts(NamedTuple):
    """What trainings are done with."""

    trainings: Trainings
    queues: TrainingQueues
    acceptance: TrainingAcceptance


def parts(folder: Path, one: OneModel) -> Parts:
    store = TrainingStore(folder / "trainings", folder / "output")
    models = cast("Models", one)
    registry = Trainings(store, heartbeat_seconds=60)
    queues = TrainingQueues(models, cast("ModelWorkers", one), stall_seconds=60)
    acceptance = TrainingAcceptance(registry, queues, models, store, AllowedRoots([]), Path, max_queued=5)
    return Parts(registry, queues, acceptance)


async def last_event(frames: AsyncIterator[bytes]) -> Any:
    async with asyncio.timeout(10):
        *_, last = [WatchTrainingResponse.FromString(frame).event async for frame in frames]
        return last


def test_an_error_that_nobody_foresaw_fails_the_training_and_frees_the_model(tmp_path: Path):
    async def scenario() -> None:
        models = OneModel()
        trainings, queues, acceptance = parts(tmp_path, models)
        run = acceptance.accept(REQUEST)
        event = await last_event(trainings.watch(run.training_id, 0))
        assert "nobody foresaw" not in event.failed.error.message
        assert run.training.state == Training.STATE_FAILED
        assert models.entry.model.state == Model.STATE_PREPARED
        await queues.close()

    asyncio.run(scenario())


def test_a_full_disk_refuses_a_training_and_leaves_no_half_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_: object, **__: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    async def scenario() -> None:
        trainings, queues, acceptance = parts(tmp_path, OneModel())
        with monkeypatch.context() as patch:
            patch.setattr(Path, "write_bytes", full)
            with pytest.raises(ExhaustedError) as caught:
                acceptance.accept(REQUEST)
        assert caught.value.reason_name == "DISK_FULL"
        assert list((tmp_path / "trainings").iterdir()) == []
        assert trainings.pending_on("m") == []
        run = acceptance.accept(REQUEST)  # the request_id was not used up
        await last_event(trainings.watch(run.training_id, 0))
        await queues.close()

    asyncio.run(scenario())


class WorkerOnAFullDisk:
    """Gives up as a worker does whose log takes no more."""

    def __init__(self, disk: FullDisk) -> None:
        self._disk = disk

    async def start_training(self, request: object) -> None:
        self._disk.is_full = True

    async def watch(self, training_id: str, after_sequence: int) -> AsyncIterator[Any]:
        raise ExhaustedError(ErrorReason.ERROR_REASON_DISK_FULL, "The disk is full. Free some space.")
        yield

    async def status(self) -> GetStatusResponse:
        return GetStatusResponse()


def events_of(frames: list[bytes]) -> list[TrainingEvent]:
    return [WatchTrainingResponse.FromString(frame).event for frame in frames]


def test_an_end_that_the_disk_does_not_take_is_shown_and_written_before_the_next_event(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    disk = FullDisk(monkeypatch)

    async def scenario() -> None:
        models = OneModel()
        models.entry.worker = cast("Any", WorkerOnAFullDisk(disk))
        trainings, queues, acceptance = parts(tmp_path, models)
        run = acceptance.accept(REQUEST)
        async with asyncio.timeout(10):
            early = events_of([frame async for frame in trainings.watch(run.training_id, 0)])
            late = events_of([frame async for frame in trainings.watch(run.training_id, 0)])
        assert early == late
        assert [event.WhichOneof("kind") for event in early] == ["state_changed", "failed"]
        assert "Free some space" in early[-1].failed.error.message
        assert [entry.event for entry in EventLogReader(run.store.event_log(run.training_id)).read()] == early[:1]
        disk.is_full = False
        run.append(TrainingEvent(warning=TrainingWarning(reason="R")))
        written = [entry.event for entry in EventLogReader(run.store.event_log(run.training_id)).read()]
        assert [event.sequence for event in written] == [1, 2, 3]
        assert written[:2] == early
        await queues.close()

    asyncio.run(scenario())


def test_a_full_disk_does_not_keep_a_training_from_being_cancelled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    disk = FullDisk(monkeypatch)
    run_folder = tmp_path / "trainings"

    async def scenario() -> None:
        trainings, queues, acceptance = parts(tmp_path, OneModel())
        run = acceptance.accept(REQUEST)
        disk.is_full = True
        run.ask(StopWish.CANCEL)
        assert run.wish is StopWish.CANCEL
        assert not list(run_folder.glob("*/*.tmp"))  # the little room there is stays free
        disk.is_full = False
        await last_event(trainings.watch(run.training_id, 0))
        assert run.training.state == Training.STATE_CANCELLED
        await queues.close()

    asyncio.run(scenario())


def test_a_worker_that_trains_on_when_its_training_is_given_up_is_ended_before_the_log_is_written(tmp_path: Path):
    class DeafToPause:
        """Fails in a call beside the training, which goes on."""

        async def start_training(self, request: StartTrainingRequest) -> None:
            self.training_id = request.training_id

        def watch(self, training_id: str, after_sequence: int) -> AsyncIterator[Any]:
            raise RuntimeError("nobody foresaw this")

        async def status(self) -> GetStatusResponse:
            return GetStatusResponse(training_active=True, training_id=self.training_id)

    async def scenario() -> None:
        models = OneModel()
        models.entry.worker = cast("Any", DeafToPause())
        trainings, queues, acceptance = parts(tmp_path, models)
        run = acceptance.accept(REQUEST)
        await last_event(trainings.watch(run.training_id, 0))
        assert models.put_away_count == 1
        await queues.close()

    asyncio.run(scenario())
