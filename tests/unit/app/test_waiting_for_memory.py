"""Loads that do not fit: refused, or kept waiting until memory is given back, as the caller asked."""

import asyncio
import json
import struct
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, cast

import pytest

from unslothd.v1.model_pb2 import LoadProgress, Model
from unslothd.v1.server_info_pb2 import Device
from unslothd.v1.service_pb2 import LoadModelRequest
from unslothd.worker.v1.worker_service_pb2 import GetStatusResponse, LoadModelResponse
from unslothd_server.app import model_workers
from unslothd_server.app.model_store import ModelStore
from unslothd_server.app.models import Models
from unslothd_server.app.paths import AllowedRoots
from unslothd_server.errors import ExhaustedError, PreconditionError

GIB = 2**30


class OneGpu:
    """A device of 8 GiB."""

    free = GIB

    def list(self) -> list[Device]:
        return [Device(device="cuda:0", total_memory_bytes=8 * GIB, free_memory_bytes=self.free)]


class QuickWorker:
    """Loads at once and lives until it is stopped."""

    model_id = "m"

    def __init__(self) -> None:
        self._stopped = asyncio.Event()

    async def load(self, request: object) -> AsyncIterator[LoadModelResponse]:
        yield LoadModelResponse(model=Model(device="cuda:0"))

    async def status(self) -> GetStatusResponse:
        return GetStatusResponse()

    async def stop(self) -> None:
        self._stopped.set()

    async def exited(self) -> Any:
        await self._stopped.wait()
        return type("End", (), {"asked": True})


class QuickLauncher:
    """Starts quick workers."""

    has_spare = False

    async def launch(self, model_id: str, *, device_map: str) -> QuickWorker:
        return QuickWorker()


@pytest.fixture(autouse=True)
def looks_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_workers, "_LOOK_FOR_MEMORY_SECONDS", 0)


def models(folder: Path, gpu: OneGpu, gibs: int) -> Models:
    """A registry, and a model folder whose 16-bit weights have `gibs` GiB."""
    (folder / "big").mkdir(parents=True)
    (folder / "big" / "config.json").write_text("{}")
    header = json.dumps({"w": {"dtype": "BF16", "shape": [gibs * GIB // 2, 1], "data_offsets": [0, 0]}}).encode()
    (folder / "big" / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    return Models(
        cast("Any", QuickLauncher()),
        cast("Any", gpu),
        AllowedRoots([folder]),
        ModelStore(folder / "store"),
        max_loaded=3,
        result_of=lambda training_id, step: Path(training_id),
    )


def request(*, wait: bool) -> LoadModelRequest:
    return LoadModelRequest(model_name="big", load_in_4bit=False, dtype="bfloat16", wait_for_memory=wait)


def test_a_load_that_waits_begins_once_memory_is_given_back(tmp_path: Path):
    async def scenario() -> None:
        gpu = OneGpu()
        seen = []
        async with asyncio.timeout(30):
            async for response in models(tmp_path, gpu, 4).load(request(wait=True)):
                seen.append(response)
                if response.progress.phase == LoadProgress.PHASE_WAITING_FOR_MEMORY:
                    assert (response.progress.done, response.progress.total > 4 * GIB) == (gpu.free, True)
                    gpu.free = 7 * GIB
        phases = [response.progress.phase for response in seen[:-1]]
        assert phases == [LoadProgress.PHASE_WAITING_FOR_MEMORY, LoadProgress.PHASE_STARTING_WORKER]
        assert seen[-1].model.state == Model.STATE_READY

    asyncio.run(scenario())


def test_a_load_that_does_not_wait_is_refused(tmp_path: Path):
    async def scenario() -> None:
        with pytest.raises(ExhaustedError) as caught:
            _ = [each async for each in models(tmp_path, OneGpu(), 4).load(request(wait=False))]
        assert caught.value.reason_name == "INSUFFICIENT_MEMORY"

    asyncio.run(scenario())


def test_a_load_that_could_never_fit_is_refused_although_it_would_wait(tmp_path: Path):
    async def scenario() -> None:
        with pytest.raises(ExhaustedError):
            _ = [each async for each in models(tmp_path, OneGpu(), 9).load(request(wait=True))]

    asyncio.run(scenario())


def test_unloading_a_model_whose_load_has_not_made_a_step_ends_it_and_gives_its_memory_back(tmp_path: Path):
    async def scenario() -> None:
        gpu = OneGpu()
        gpu.free = 6 * GIB
        registry = models(tmp_path, gpu, 4)

        async def load() -> None:
            await anext(registry.load(request(wait=False)))

        async with asyncio.timeout(30):
            await asyncio.gather(load(), registry.unload("big-unsloth"))
            *_, last = [each async for each in registry.load(request(wait=False))]
        assert last.model.model_id == "big-unsloth"
        await registry.close(leave_workers=False)

    asyncio.run(scenario())


def test_unloading_a_model_that_waits_ends_the_wait_and_forgets_it(tmp_path: Path):
    async def scenario() -> None:
        registry = models(tmp_path, OneGpu(), 4)
        responses = registry.load(request(wait=True))
        await registry.unload((await anext(responses)).progress.model_id)
        with pytest.raises(PreconditionError) as caught:
            await asyncio.wait_for(anext(responses), 30)
        assert "unloaded while it loaded" in caught.value.message
        assert await registry.describe_all() == []
        assert list((tmp_path / "store").iterdir()) == []

    asyncio.run(scenario())
