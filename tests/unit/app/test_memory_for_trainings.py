"""Trainings whose model does not fit when it has to be loaded again: refused to a user, waited for by the server."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from support.app_in_memory import AppInMemory, OneDevice, until, warnings, write_model
from unslothd.v1.model_pb2 import Model
from unslothd.v1.training_pb2 import Training
from unslothd_server.app import model_workers, training_workers
from unslothd_server.errors import ExhaustedError

GIB = 2**30


@pytest.fixture(autouse=True)
def looks_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_workers, "_LOOK_FOR_MEMORY_SECONDS", 0)
    monkeypatch.setattr(training_workers, "_LOOK_AT_WAIT_SECONDS", 0.001)


def play(folder: Path, scenario: Callable[[AppInMemory], Awaitable[None]], *, gibs: int = 4) -> None:
    """Runs a scenario over a model of so many GiB, for which there is room at first; 0 = its size is not known."""

    async def run() -> None:
        write_model(folder / "roots" / "m", gibs * GIB)
        app = AppInMemory(folder, OneDevice(free=8 * GIB))
        await app.start()
        async with asyncio.timeout(60):
            await scenario(app)

    asyncio.run(run())


def test_a_resume_that_does_not_fit_is_refused_with_figures_and_the_training_stays_paused(tmp_path: Path):
    async def scenario(app: AppInMemory) -> None:
        run = app.train(await app.prepared_model())
        await app.at_step(run, 2)
        await app.control.pause(run.training_id)
        await until(lambda: not app.host.living)
        written = run.training.last_sequence
        app.device.free = GIB
        with pytest.raises(ExhaustedError) as caught:
            app.resume(run)
        assert caught.value.reason_name == "INSUFFICIENT_MEMORY"
        assert int(caught.value.metadata["free_bytes"]) == GIB
        assert int(caught.value.metadata["needed_bytes"]) > 4 * GIB
        assert "then resume again" in caught.value.message
        assert (run.training.state, run.training.last_sequence) == (Training.STATE_PAUSED, written)
        app.device.free = 8 * GIB
        app.resume(run)
        assert (await app.in_worker(run)).step == 2

    play(tmp_path, scenario)


def test_a_resume_of_a_model_that_is_gone_leaves_nothing_of_it_when_it_is_refused(tmp_path: Path):
    async def scenario(app: AppInMemory) -> None:
        model_id = await app.prepared_model()
        run = app.train(model_id)
        (await app.at_step(run, 1)).fail()
        await until(lambda: run.is_halted)
        await app.lifecycle.unload(model_id)
        app.device.free = GIB
        with pytest.raises(ExhaustedError):
            app.resume(run)
        assert await app.models.describe_all() == []
        assert run.training.state == Training.STATE_FAILED

    play(tmp_path, scenario)


def test_a_worker_that_is_replaced_waits_for_memory_and_the_log_says_so_once(tmp_path: Path):
    async def scenario(app: AppInMemory) -> None:
        run = app.train(await app.prepared_model())
        await app.at_step(run, 2)
        app.device.free = GIB
        app.worker.die()
        await until(lambda: "WAITING_FOR_MEMORY" in warnings(run))
        assert run.training.state == Training.STATE_RECOVERING
        app.device.free = 8 * GIB
        (await app.at_step(run, 3)).succeed()
        await until(lambda: run.training.state == Training.STATE_SUCCEEDED)
        assert warnings(run) == ["WAITING_FOR_MEMORY"]

    play(tmp_path, scenario)


def test_a_restart_waits_for_memory_and_then_goes_on(tmp_path: Path):
    async def scenario(app: AppInMemory) -> None:
        run = app.train(await app.prepared_model())
        await app.at_step(run, 2)
        app.device.free = GIB
        await app.kill_and_start(workers=True)
        run = app.run_of(run)
        await until(lambda: "WAITING_FOR_MEMORY" in warnings(run))
        app.device.free = 8 * GIB
        assert (await app.in_worker(run)).step == 2

    play(tmp_path, scenario)


@pytest.mark.parametrize("stop", ["pause", "cancel"])
def test_a_training_that_waits_for_memory_can_be_stopped(tmp_path: Path, stop: str):
    async def scenario(app: AppInMemory) -> None:
        model_id = await app.prepared_model()
        run, behind = app.train(model_id), app.train(model_id)
        await app.at_step(run, 2)
        app.device.free = GIB
        app.worker.die()
        await until(lambda: "WAITING_FOR_MEMORY" in warnings(run))
        if stop == "pause":
            await app.control.pause(run.training_id)
            await until(lambda: run.is_paused)
            await until(lambda: app.models.get(model_id).model.state == Model.STATE_SUSPENDED)
            app.device.free = 8 * GIB
            app.resume(run)
            assert (await app.in_worker(run)).step == 2
        else:
            await app.control.cancel(run.training_id, save_checkpoint=False)
            await until(lambda: run.training.state == Training.STATE_CANCELLED)
            app.device.free = 8 * GIB
            await app.in_worker(behind)

    play(tmp_path, scenario)


def test_a_model_of_unknown_size_is_known_by_what_it_took(tmp_path: Path):
    async def scenario(app: AppInMemory) -> None:
        app.host.memory_bytes = 5 * GIB
        run = app.train(await app.prepared_model())
        await app.at_step(run, 1)
        await app.control.pause(run.training_id)
        await until(lambda: not app.host.living)
        app.device.free = GIB
        with pytest.raises(ExhaustedError) as caught:
            app.resume(run)
        assert caught.value.metadata["needed_bytes"] == str(5 * GIB)

    play(tmp_path, scenario, gibs=0)
