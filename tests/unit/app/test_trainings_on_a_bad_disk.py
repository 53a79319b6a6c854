"""Trainings when the server's own disk lets it down: no half-made folder, no training that hangs."""

import asyncio
import errno
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, cast

import pytest

from unslothd.v1.dataset_pb2 import DatasetSource, InlineRows
from unslothd.v1.model_pb2 import Model
from unslothd.v1.service_pb2 import TrainRequest, WatchTrainingResponse
from unslothd.v1.training_pb2 import Training
from unslothd_server.app.models import LoadedModel, Models
from unslothd_server.app.paths import AllowedRoots
from unslothd_server.app.training_store import TrainingStore
from unslothd_server.app.trainings import Trainings
from unslothd_server.errors import ExhaustedError

REQUEST = TrainRequest(model_id="m", train_dataset=DatasetSource(inline=InlineRows(data=b"{}")), request_id="r")


class OneModel:
    """A registry with one prepared model; its worker breaks with an error that nobody foresaw."""

    def __init__(self) -> None:
        self.entry = LoadedModel(Model(model_id="m", state=Model.STATE_PREPARED), worker=cast("Any", self))

    def get(self, model_id: str) -> LoadedModel:
        return self.entry

    async def start_training(self, request: object) -> None:
        raise RuntimeError("nobody foresaw this")


def trainings(folder: Path) -> Trainings:
    store = TrainingStore(folder / "trainings", folder / "output")
    return Trainings(store, AllowedRoots([]), Path, max_queued=5, heartbeat_seconds=60)


async def last_event(frames: AsyncIterator[bytes]) -> Any:
    async with asyncio.timeout(10):
        *_, last = [WatchTrainingResponse.FromString(frame).event async for frame in frames]
        return last


def test_an_error_that_nobody_foresaw_fails_the_training_and_frees_the_model(tmp_path: Path):
    async def scenario() -> None:
        registry, models = trainings(tmp_path), OneModel()
        run = registry.accept(REQUEST, cast("Models", models))
        event = await last_event(registry.watch(run.training_id, 0))
        assert "nobody foresaw" not in event.failed.error.message
        assert run.training.state == Training.STATE_FAILED
        assert models.entry.model.state == Model.STATE_PREPARED
        await registry.close()

    asyncio.run(scenario())


def test_a_full_disk_refuses_a_training_and_leaves_no_half_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_: object, **__: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    async def scenario() -> None:
        registry, models = trainings(tmp_path), cast("Models", OneModel())
        with monkeypatch.context() as patch:
            patch.setattr(Path, "write_bytes", full)
            with pytest.raises(ExhaustedError) as caught:
                registry.accept(REQUEST, models)
        assert caught.value.reason_name == "DISK_FULL"
        assert list((tmp_path / "trainings").iterdir()) == []
        assert registry.pending_on("m") == []
        run = registry.accept(REQUEST, models)  # the request_id was not used up
        await last_event(registry.watch(run.training_id, 0))
        await registry.close()

    asyncio.run(scenario())
