"""Spare worker processes: given to a model, found again by the next server, and gone when nobody needs them."""

import os
import signal
from pathlib import Path

from integration.worker.harness import LOAD, Home, bounded, kinds, raised_by, trained, until
from unslothd.v1.error_reason_pb2 import ErrorReason
from unslothd.v1.model_pb2 import LoadProgress, Model
from unslothd.worker.v1 import worker_service_pb2 as messages
from unslothd_server.errors import PreconditionError
from unslothd_server.workers.channel import WorkerProcess
from unslothd_server.workers.liveness import lock_holder, session_members


async def loaded(worker: WorkerProcess) -> list[messages.LoadModelResponse]:
    return [response async for response in worker.load(LOAD)]


async def given(home: Home, model_id: str = "m") -> WorkerProcess:
    """A worker that began as a spare and has its model loaded."""
    launcher = home.launcher()
    worker = await launcher.launch_spare()
    await worker.imported()
    await launcher.hand_over(worker, model_id, device_map="cpu")
    await loaded(worker)
    return worker


def test_a_spare_becomes_the_worker_of_a_model_and_loads_without_an_import(home: Home):
    async def test() -> None:
        launcher = home.launcher()
        worker = await launcher.launch_spare()
        await worker.imported()
        pid = worker.pid
        await launcher.hand_over(worker, "m", device_map="cpu")

        responses = await loaded(worker)

        assert [response.progress.phase for response in responses[:-1]] == [LoadProgress.PHASE_LOADING_WEIGHTS]
        model = responses[-1].model
        assert (model.model_id, model.device_map, model.state) == ("m", "cpu", Model.STATE_READY)
        assert (worker.model_id, worker.pid) == ("m", pid)
        await worker.prepare(messages.PrepareForTrainingRequest())
        assert kinds(await trained(worker, home.training()))[-1] == "succeeded"
        await worker.stop()
        assert list((home.path / "workers").iterdir()) == []
        assert "spare worker" in (home.path / "logs" / "worker-m.log").read_text()

    bounded(test())


def test_a_spare_that_still_imports_can_be_given_to_a_model(home: Home, tmp_path: Path):
    async def test() -> None:
        gate = tmp_path / "import-may-end"
        launcher = home.launcher(import_gate=gate)
        worker = await launcher.launch_spare()
        await launcher.hand_over(worker, "m", device_map="auto")
        load = worker.load(LOAD)
        assert (await anext(load)).progress.phase == LoadProgress.PHASE_STARTING_WORKER
        gate.touch()
        assert [response async for response in load][-1].model.model_id == "m"
        await worker.stop()

    bounded(test())


def test_a_worker_has_one_model_in_its_life(home: Home):
    async def test() -> None:
        launcher = home.launcher()
        worker = await launcher.launch_spare()

        refused = await raised_by(loaded(worker))
        assert isinstance(refused, PreconditionError)
        assert refused.reason == ErrorReason.ERROR_REASON_MODEL_NOT_READY
        assert "TakeModel" in refused.message

        await launcher.hand_over(worker, "m", device_map="auto")
        await worker.take_model("m", device_map="auto")
        refused = await raised_by(worker.take_model("other", device_map="auto"))
        assert isinstance(refused, PreconditionError)
        assert "worker of model 'm'" in refused.message
        await worker.stop()

    bounded(test())


def test_the_next_server_finds_a_worker_that_began_as_a_spare(home: Home):
    pids: list[int] = []

    async def first_server() -> None:
        worker = await given(home)
        pids.append(worker.pid)
        await worker.detach()

    async def second_server() -> None:
        (worker,) = home.launcher().attach_living()
        assert (worker.model_id, worker.pid) == ("m", pids[0])
        assert (await worker.status()).model.model_id == "m"
        await worker.stop()
        assert list((home.path / "workers").iterdir()) == []

    bounded(first_server())
    bounded(second_server())


def test_a_launch_ends_a_leftover_of_the_model_that_began_as_a_spare(home: Home):
    pids: list[int] = []

    async def first_server() -> None:
        worker = await given(home)
        pids.append(worker.pid)
        await worker.detach()

    async def second_server() -> None:
        worker = await given(home)
        assert session_members(pids[0]) == []
        assert len(list((home.path / "workers").iterdir())) == 1
        await worker.stop()

    bounded(first_server())
    bounded(second_server())


def test_a_spare_that_nobody_took_is_no_model_and_leaves_nothing(home: Home):
    pids: list[int] = []

    async def first_server() -> None:
        worker = await home.launcher().launch_spare()
        pids.append(worker.pid)
        await worker.detach()

    async def second_server() -> None:
        (worker,) = home.launcher().attach_living()
        assert worker.model_id.startswith("spare-")
        await worker.stop()
        assert session_members(pids[0]) == []
        assert list((home.path / "workers").iterdir()) == []
        assert (home.path / "logs" / "worker-spare.log").exists()

    bounded(first_server())
    bounded(second_server())


def test_folders_of_dead_spares_are_removed_and_those_of_living_ones_stay(home: Home):
    async def test() -> None:
        launcher = home.launcher()
        alive, dead = await launcher.launch_spare(), await launcher.launch_spare()
        await dead.detach()
        os.kill(dead.pid, signal.SIGKILL)
        await until(lambda: len(lock_holders(home)) == 1)

        launcher.remove_dead_spares()

        assert [folder.name for folder in (home.path / "workers").iterdir()] == [alive.model_id]
        await alive.stop()

    bounded(test())


def lock_holders(home: Home) -> list[int]:
    """Processes that hold the lock of a worker's folder."""
    return [pid for lock in home.path.glob("workers/*/worker.lock") if (pid := lock_holder(lock))]
