"""Loads that do not fit: refused, or kept waiting until memory is given back, as the caller asked."""

import asyncio
from pathlib import Path

import pytest

from support.app_in_memory import AppInMemory, OneDevice, write_model
from unslothd.v1.model_pb2 import LoadProgress, Model
from unslothd.v1.service_pb2 import LoadModelRequest
from unslothd_server.app import model_workers
from unslothd_server.errors import ExhaustedError, PreconditionError

GIB = 2**30


@pytest.fixture(autouse=True)
def looks_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_workers, "_LOOK_FOR_MEMORY_SECONDS", 0)


async def app_of(folder: Path, *, gibs: int, free: int) -> AppInMemory:
    """A server on a device of 8 GiB, `free` of them free, and a model "m" whose 16-bit weights have `gibs` GiB."""
    write_model(folder / "roots" / "m", gibs * GIB)
    app = AppInMemory(folder, OneDevice(free=free * GIB, total=8 * GIB))
    await app.start()
    return app


def request(*, wait: bool) -> LoadModelRequest:
    return LoadModelRequest(model_name="m", load_in_4bit=False, dtype="bfloat16", wait_for_memory=wait)


def test_a_load_that_waits_begins_once_memory_is_given_back(tmp_path: Path):
    async def scenario() -> None:
        app = await app_of(tmp_path, gibs=4, free=1)
        seen = []
        async with asyncio.timeout(30):
            async for response in app.lifecycle.load(request(wait=True)):
                seen.append(response)
                if response.progress.phase == LoadProgress.PHASE_WAITING_FOR_MEMORY:
                    assert (response.progress.done, response.progress.total > 4 * GIB) == (GIB, True)
                    app.device.free = 7 * GIB
        phases = [response.progress.phase for response in seen[:-1]]
        assert phases == [LoadProgress.PHASE_WAITING_FOR_MEMORY, LoadProgress.PHASE_STARTING_WORKER]
        assert seen[-1].model.state == Model.STATE_READY

    asyncio.run(scenario())


def test_a_load_that_does_not_wait_is_refused(tmp_path: Path):
    async def scenario() -> None:
        app = await app_of(tmp_path, gibs=4, free=1)
        with pytest.raises(ExhaustedError) as caught:
            _ = [each async for each in app.lifecycle.load(request(wait=False))]
        assert caught.value.reason_name == "INSUFFICIENT_MEMORY"

    asyncio.run(scenario())


def test_a_load_that_could_never_fit_is_refused_although_it_would_wait(tmp_path: Path):
    async def scenario() -> None:
        app = await app_of(tmp_path, gibs=9, free=1)
        with pytest.raises(ExhaustedError):
            _ = [each async for each in app.lifecycle.load(request(wait=True))]

    asyncio.run(scenario())


def test_unloading_a_model_whose_load_has_not_made_a_step_ends_it_and_gives_its_memory_back(tmp_path: Path):
    async def scenario() -> None:
        app = await app_of(tmp_path, gibs=4, free=6)

        async def load() -> None:
            await anext(app.lifecycle.load(request(wait=False)))

        async with asyncio.timeout(30):
            await asyncio.gather(load(), app.lifecycle.unload("m-unsloth"))
            *_, last = [each async for each in app.lifecycle.load(request(wait=False))]
        assert last.model.model_id == "m-unsloth"
        await app.lifecycle.close(leave_workers=False)

    asyncio.run(scenario())


def test_unloading_a_model_that_waits_ends_the_wait_and_forgets_it(tmp_path: Path):
    async def scenario() -> None:
        app = await app_of(tmp_path, gibs=4, free=1)
        responses = app.lifecycle.load(request(wait=True))
        await app.lifecycle.unload((await anext(responses)).progress.model_id)
        with pytest.raises(PreconditionError) as caught:
            await asyncio.wait_for(anext(responses), 30)
        assert "unloaded while it loaded" in caught.value.message
        assert await app.models.describe_all() == []
        assert list((tmp_path / "models").iterdir()) == []

    asyncio.run(scenario())
