"""Workers that not even SIGKILL ends: what ran on them fails with a clear error, what waits waits on, nothing dies."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from doubles.in_memory_workers import Grip
from support.app_in_memory import AppInMemory, events, until, warnings, write_model
from unslothd.v1.error_reason_pb2 import ErrorReason
from unslothd.v1.model_pb2 import Model
from unslothd.v1.training_pb2 import Training
from unslothd_server.app import training_workers, worker_loss
from unslothd_server.app.worker_exit import WorkerStuckError
from unslothd_server.errors import AbortedError


@pytest.fixture(autouse=True)
def looks_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_workers, "_LOOK_AT_WAIT_SECONDS", 0.001)


def play(folder: Path, scenario: Callable[[AppInMemory], Awaitable[None]], *, stall_seconds: float = 3600) -> None:
    """Runs a scenario; no task of it may end by an exception that nobody saw."""
    unseen: list[dict[str, object]] = []

    async def run() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: unseen.append(context))
        write_model(folder / "roots" / "m")
        app = AppInMemory(folder, stall_seconds=stall_seconds)
        await app.start()
        async with asyncio.timeout(60):
            await scenario(app)

    asyncio.run(run())
    assert unseen == []


def test_a_training_on_a_worker_that_does_not_end_fails_and_those_behind_wait_and_go_on(tmp_path: Path):
    async def scenario(app: AppInMemory) -> None:
        model_id = await app.prepared_model()
        worker = app.worker
        worker.is_stuck = worker.hangs = True
        run, behind = app.train(model_id), app.train(model_id)
        await until(lambda: run.is_halted)
        assert run.training.state == Training.STATE_FAILED
        assert "does not end, not even by SIGKILL" in run.training.error.message
        assert [event.WhichOneof("kind") for event in events(run)][-1] == "failed"
        await until(lambda: "WAITING_FOR_WORKER" in warnings(behind))
        assert behind.training.state == Training.STATE_QUEUED
        assert await app.state_of(model_id) == Model.STATE_FAILED
        worker.is_stuck = False
        (await app.in_worker(behind)).succeed()
        await until(lambda: behind.training.state == Training.STATE_SUCCEEDED)
        assert warnings(behind) == ["WAITING_FOR_WORKER"]

    play(tmp_path, scenario, stall_seconds=0.001)


def test_a_training_that_waits_for_a_worker_to_end_can_be_cancelled(tmp_path: Path):
    async def scenario(app: AppInMemory) -> None:
        model_id = await app.prepared_model()
        app.worker.is_stuck = app.worker.hangs = True
        app.train(model_id)
        behind = app.train(model_id)
        await until(lambda: "WAITING_FOR_WORKER" in warnings(behind))
        await app.control.cancel(behind.training_id, save_checkpoint=False)
        await until(lambda: behind.training.state == Training.STATE_CANCELLED)

    play(tmp_path, scenario, stall_seconds=0.001)


def test_a_pause_whose_worker_does_not_end_is_a_pause_all_the_same(tmp_path: Path):
    async def scenario(app: AppInMemory) -> None:
        model_id = await app.prepared_model()
        run = app.train(model_id)
        await app.at_step(run, 2)
        worker = app.worker
        worker.is_stuck = True
        await app.control.pause(run.training_id)
        await until(lambda: app.models.get(model_id).model.state == Model.STATE_FAILED)
        assert run.is_paused
        worker.is_stuck = False
        app.resume(run)
        assert (await app.in_worker(run)).step == 2

    play(tmp_path, scenario)


def test_unloading_a_worker_that_does_not_end_says_so_and_can_be_tried_again(tmp_path: Path):
    async def scenario(app: AppInMemory) -> None:
        model_id = await app.prepared_model()
        worker = app.worker
        worker.is_stuck = True
        with pytest.raises(WorkerStuckError) as caught:
            await app.lifecycle.unload(model_id)
        assert caught.value.reason_name == "WORKER_UNRESPONSIVE"
        assert caught.value.metadata["pid"] == "4711"
        worker.is_stuck = False
        await app.lifecycle.unload(model_id)
        assert await app.models.describe_all() == []

    play(tmp_path, scenario)


def test_a_server_with_a_worker_that_does_not_end_stops(tmp_path: Path):
    async def scenario(app: AppInMemory) -> None:
        await app.prepared_model()
        app.worker.is_stuck = True
        await app.lifecycle.close(leave_workers=False)

    play(tmp_path, scenario)


def test_a_bug_that_ends_a_driver_ends_its_training_and_not_the_queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    async def scenario(app: AppInMemory) -> None:
        model_id = await app.prepared_model()
        run, behind = app.train(model_id), app.train(model_id)
        await app.at_step(run, 1)
        with monkeypatch.context() as bug:
            bug.setattr(worker_loss, "_recovery", lambda *_: 1 / 0)
            app.worker.die()
            await until(lambda: run.is_halted)
        assert run.training.state == Training.STATE_FAILED
        assert "error id" in run.training.error.message
        (await app.in_worker(behind)).succeed()
        await until(lambda: behind.training.state == Training.STATE_SUCCEEDED)

    play(tmp_path, scenario)


def test_a_training_whose_worker_is_given_up_goes_on_with_another_also_when_the_first_would_still_end_it(
    tmp_path: Path,
):
    async def scenario(app: AppInMemory) -> None:
        model_id = await app.prepared_model()
        run = app.train(model_id)
        await app.at_step(run, 2)
        slow = app.worker
        slow.hangs = True
        await until(slow.end.done)
        assert (await app.in_worker(run)).step == 2
        assert "cancelled" not in [event.WhichOneof("kind") for event in events(run)]
        (await app.in_worker(run)).succeed()
        await until(lambda: run.training.state == Training.STATE_SUCCEEDED)

    play(tmp_path, scenario, stall_seconds=0.001)


def test_a_training_goes_on_whose_worker_does_not_answer_the_next_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    async def scenario(app: AppInMemory) -> None:
        model_id = await app.prepared_model()
        before = app.train(model_id)
        await app.at_step(before, 2)
        slow = app.worker

        async def no_answer(_: Grip) -> None:
            raise AbortedError(ErrorReason.ERROR_REASON_WORKER_UNRESPONSIVE, "It did not answer.")

        with monkeypatch.context() as overload:
            overload.setattr(Grip, "status", no_answer)
            await app.kill_and_start()
        assert slow.end.done()
        run = app.run_of(before)
        assert (await app.in_worker(run)).step == 2
        (await app.in_worker(run)).succeed()
        await until(lambda: run.training.state == Training.STATE_SUCCEEDED)

    play(tmp_path, scenario)
