"""Trainings when the server's own disk lets it down: no half-made folder, no training that hangs."""

import asyncio
import errno
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, cast

import pytest

from unslothd.v1.dataset_pb2 import DatasetSource, InlineRows
from unslothd.v1.model_pb2 import Model
from unslothd.v1.service_pb2 import LoadModelRequest, TrainRequest, WatchTrainingResponse
from unslothd.v1.training_pb2 import Training
from unslothd.worker.v1.worker_service_pb2 import PrepareForTrainingRequest
from unslothd_server.app.loaded_model import LoadedModel
from unslothd_server.app.model_store import StoredModel
from unslothd_server.app.models import Models
from unslothd_server.app.paths import AllowedRoots
from unslothd_server.app.training_store import TrainingStore
from unslothd_server.app.trainings import Trainings
from unslothd_server.errors import ExhaustedError

REQUEST = TrainRequest(model_id="m", train_dataset=DatasetSource(inline=InlineRows(data=b"{}")), request_id="r")


class BrokenWorker:
    """Breaks with an error that nobody foresaw."""

    async def start_training(self, request: object) -> None:
        raise RuntimeError("nobody foresaw this")


class OneModel:
    """A registry with one prepared model."""

    is_closing = False

    def __init__(self) -> None:
        model = Model(model_id="m", state=Model.STATE_PREPARED)
        stored = StoredModel(model, LoadModelRequest(), "tiny", prepare=PrepareForTrainingRequest())
        self.entry = LoadedModel(stored, worker=cast("Any", BrokenWorker()))

    def get(self, model_id: str) -> LoadedModel:
        return self.entry

    async def working(self, entry: LoadedModel) -> Any:
        return entry.worker


def trainings(folder: Path, models: OneModel) -> Trainings:
    store = TrainingStore(folder / "trainings", folder / "output")
    return Trainings(
        store, cast("Models", models), AllowedRoots([]), Path, max_queued=5, heartbeat_seconds=60, stall_seconds=60
    )


async def last_event(frames: AsyncIterator[bytes]) -> Any:
    async with asyncio.timeout(10):
        *_, last = [WatchTrainingResponse.FromString(frame).event async for frame in frames]
        return last


def test_an_error_that_nobody_foresaw_fails_the_training_and_frees_the_model(tmp_path: Path):
    async def scenario() -> None:
        models = OneModel()
        registry = trainings(tmp_path, models)
        run = registry.accept(REQUEST)
        event = await last_event(registry.watch(run.training_id, 0))
        assert "nobody foresaw" not in event.failed.error.message
        assert run.training.state == Training.STATE_FAILED
        assert models.entry.model.state == Model.STATE_PREPARED
        await registry.close(leave_running=False)

    asyncio.run(scenario())


def test_a_full_disk_refuses_a_training_and_leaves_no_half_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_: object, **__: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    async def scenario() -> None:
        registry = trainings(tmp_path, OneModel())
        with monkeypatch.context() as patch:
            patch.setattr(Path, "write_bytes", full)
            with pytest.raises(ExhaustedError) as caught:
                registry.accept(REQUEST)
        assert caught.value.reason_name == "DISK_FULL"
        assert list((tmp_path / "trainings").iterdir()) == []
        assert registry.pending_on("m") == []
        run = registry.accept(REQUEST)  # the request_id was not used up
        await last_event(registry.watch(run.training_id, 0))
        await registry.close(leave_running=False)

    asyncio.run(scenario())
