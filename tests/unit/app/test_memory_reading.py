"""What memory a worker holds is asked seldom: the answer takes the interpreter from the training in that process."""

import asyncio
from pathlib import Path
from typing import Any, cast

import pytest

from support.app_in_memory import AppInMemory, write_model
from unslothd.v1.error_reason_pb2 import ErrorReason
from unslothd.v1.model_pb2 import Model
from unslothd.worker.v1.worker_service_pb2 import GetStatusResponse
from unslothd_server.app import memory_reading
from unslothd_server.app.memory_reading import MemoryReading
from unslothd_server.errors import AbortedError


class CountingWorker:
    """Says that it holds as many bytes as it was asked times."""

    model_id = "m"

    def __init__(self) -> None:
        self.asked = 0
        self.is_dead = False

    async def status(self) -> GetStatusResponse:
        self.asked += 1
        await asyncio.sleep(0)
        if self.is_dead:
            raise AbortedError(ErrorReason.ERROR_REASON_WORKER_DIED, "It died. Load the model again.")
        return GetStatusResponse(model=Model(memory_bytes=self.asked))


class Asked:
    """A reading of a counting worker, at a time that the test sets."""

    def __init__(self) -> None:
        self.worker = CountingWorker()
        self.seconds = 100.0
        self._reading = MemoryReading(lambda: self.seconds)

    async def newer(self) -> int | None:
        return await self._reading.newer(cast("Any", self.worker))


def test_callers_of_one_moment_share_one_answer() -> None:
    async def run() -> None:
        asked = Asked()
        assert await asyncio.gather(*(asked.newer() for _ in range(100))) == [1] * 100
        assert asked.worker.asked == 1

    asyncio.run(run())


def test_a_worker_is_left_alone_for_a_second_and_then_asked_again() -> None:
    async def run() -> None:
        asked = Asked()
        assert await asked.newer() == 1
        asked.seconds += 0.9
        assert await asked.newer() is None
        asked.seconds += 0.2
        assert await asked.newer() == 2

    asyncio.run(run())


def test_a_caller_who_gives_up_takes_the_answer_from_no_other() -> None:
    async def run() -> None:
        asked = Asked()
        leaves, stays = asyncio.create_task(asked.newer()), asyncio.create_task(asked.newer())
        await asyncio.sleep(0)
        leaves.cancel()
        assert await stays == 1

    asyncio.run(run())


def test_a_dead_worker_says_nothing() -> None:
    async def run() -> None:
        asked = Asked()
        asked.worker.is_dead = True
        assert await asked.newer() is None

    asyncio.run(run())


def test_reading_models_reaches_the_worker_once_however_often_they_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_reading, "_ASK_AGAIN_SECONDS", 3600)

    async def run() -> None:
        write_model(tmp_path / "roots" / "m")
        app = AppInMemory(tmp_path)
        app.host.memory_bytes = 5
        await app.start()
        model_id = await app.prepared_model()
        at_once = await asyncio.gather(*(app.models.describe(model_id) for _ in range(50)))
        assert [model.memory_bytes for model in at_once] == [5] * 50
        assert [[model.memory_bytes for model in await app.models.describe_all()] for _ in range(50)] == [[5]] * 50
        assert app.worker.status_calls == 1

    asyncio.run(run())
