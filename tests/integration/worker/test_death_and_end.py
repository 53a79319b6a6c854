"""Deaths and ends of real worker processes: each is seen, named and bounded, and nothing is left behind."""

import asyncio
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from doubles.fake_worker import fake_worker_command
from doubles.gates import StepGate
from integration.worker.harness import HASTY, Home, at_step, bounded, events_of, kinds, raised_by, trained, until
from unslothd.v1.error_reason_pb2 import ErrorReason
from unslothd.v1.model_pb2 import LoadProgress
from unslothd.v1.training_pb2 import Training
from unslothd.worker.v1 import worker_service_pb2 as messages
from unslothd.worker.v1.bootstrap_pb2 import WorkerBootstrap
from unslothd_server.errors import AbortedError, PreconditionError
from unslothd_server.event_log import EventLogReader
from unslothd_server.workers.launcher import LocalLauncher
from unslothd_server.workers.liveness import lock_holder, session_members
from unslothd_server.workers.timeouts import WorkerTimeouts


def assert_died(error: BaseException, **metadata: str) -> AbortedError:
    assert isinstance(error, AbortedError)
    assert error.reason == ErrorReason.ERROR_REASON_WORKER_DIED
    assert error.metadata == {"model_id": "m", **metadata}
    return error


def test_kill_9_is_a_typed_error_with_the_signal_and_the_log_for_every_call(home: Home, tmp_path: Path):
    async def test() -> None:
        worker = await home.prepared()
        gate = StepGate(tmp_path / "gate")
        await worker.start_training(home.training(steps=10, gate=str(gate)))
        watch = asyncio.create_task(raised_by(events_of(worker)))
        gate.open(1, 2)
        await at_step(worker, 2)
        os.kill(worker.pid, signal.SIGKILL)

        error = assert_died(await watch, signal="SIGKILL")
        assert "was ended by SIGKILL" in error.message
        assert "worker of model m" in error.message.split("Last lines of its log:\n")[1]
        assert_died(await raised_by(worker.status()), signal="SIGKILL")
        end = await worker.exited()
        assert (end.signal, end.exit_code, end.asked) == ("SIGKILL", None, False)
        assert await worker.stop() == end
        assert not (home.path / "workers" / "m").exists()

    bounded(test())


def test_what_was_logged_before_a_kill_is_all_there(home: Home):
    async def test() -> None:
        worker = await home.prepared()
        request = home.training(steps=10, die_at_step=4, die="SIGKILL")
        assert_died(await raised_by(trained(worker, request)), signal="SIGKILL")

        log = [entry.event for entry in EventLogReader(Path(request.training_dir) / "events.binpb").read()]
        assert kinds(log) == ["state_changed", "started", "step", "step", "step"]
        await worker.stop()

    bounded(test())


@pytest.mark.parametrize(
    ("how", "metadata"),
    [("exit:7", {"exit_code": "7"}), ("SIGSEGV", {"signal": "SIGSEGV"}), ("SIGABRT", {"signal": "SIGABRT"})],
)
def test_a_worker_that_ends_by_itself_is_told_by_exit_code_or_signal(home: Home, how: str, metadata: dict[str, str]):
    async def test() -> None:
        worker = await home.prepared()
        request = home.training(die_at_step=2, die=how)

        error = assert_died(await raised_by(trained(worker, request)), **metadata)

        assert f"misbehaving as told: {how}" in error.message
        await worker.stop()

    bounded(test())


def test_a_death_while_loading_ends_the_load(home: Home):
    async def test() -> None:
        worker = await home.launcher(model={"load": "exit:3"}).launch("m", device_map="auto")

        async def load() -> None:
            async for _ in worker.load(messages.LoadModelRequest(source="x")):
                pass

        assert_died(await raised_by(load()), exit_code="3")
        await worker.stop()

    bounded(test())


def test_a_command_that_fails_at_once_fails_the_launch_and_leaves_nothing(home: Home):
    async def test() -> None:
        command = [sys.executable, "-c", "import sys; sys.exit('no such engine')"]
        launcher = LocalLauncher(home.path, command=command)

        error = assert_died(await raised_by(launcher.launch("m", device_map="auto")), exit_code="1")

        assert "no such engine" in error.message
        assert list((home.path / "workers").iterdir()) == []

    bounded(test())


def test_a_worker_that_never_listens_is_ended_within_the_bound(home: Home):
    async def test() -> None:
        command = [sys.executable, "-c", "import signal; signal.pause()"]
        timeouts = WorkerTimeouts(
            start=0.5, answer=0.2, end_in_order=0.2, end_on_sigterm=5, death_after_broken_call=0.1
        )

        error = await raised_by(LocalLauncher(home.path, command=command, timeouts=timeouts).launch("m", device_map=""))

        assert isinstance(error, AbortedError)
        assert error.reason == ErrorReason.ERROR_REASON_WORKER_UNRESPONSIVE
        assert list((home.path / "workers").iterdir()) == []

    bounded(test())


def test_a_launch_that_is_cancelled_leaves_nothing(home: Home):
    async def test() -> None:
        command = [sys.executable, "-c", "import signal; signal.pause()"]
        timeouts = WorkerTimeouts(answer=0.2, end_in_order=0.2, death_after_broken_call=0.1)
        launch = asyncio.create_task(
            LocalLauncher(home.path, command=command, timeouts=timeouts).launch("m", device_map="")
        )
        await until((home.path / "workers" / "m" / "worker.log").exists)

        launch.cancel()
        await asyncio.wait([launch])

        assert launch.cancelled()
        assert list((home.path / "workers").iterdir()) == []

    bounded(test())


def test_a_stopped_process_is_unresponsive_not_dead(home: Home):
    async def test() -> None:
        worker = await home.loaded(timeouts=WorkerTimeouts(answer=0.5, end_in_order=0.2, end_on_sigterm=0.2))
        os.kill(worker.pid, signal.SIGSTOP)

        error = await raised_by(worker.status())

        assert isinstance(error, AbortedError)
        assert error.reason == ErrorReason.ERROR_REASON_WORKER_UNRESPONSIVE
        os.kill(worker.pid, signal.SIGCONT)
        assert (await worker.status()).pid == worker.pid
        os.kill(worker.pid, signal.SIGSTOP)
        assert (await worker.stop()).signal == "SIGKILL"

    bounded(test())


def test_an_idle_worker_stops_in_order_once_however_often_it_is_asked(home: Home):
    async def test() -> None:
        worker = await home.loaded()

        ends = await asyncio.gather(worker.stop(), worker.stop(), worker.exited())

        assert ends == [ends[0]] * 3
        assert (ends[0].exit_code, ends[0].signal, ends[0].asked) == (0, None, True)
        assert await worker.stop() == ends[0]
        assert session_members(worker.pid) == []
        assert list((home.path / "workers").iterdir()) == []
        assert "ending: asked by Shutdown" in (home.path / "logs" / "worker-m.log").read_text()

    bounded(test())


def test_a_worker_that_ignores_everything_is_killed_with_its_children_within_the_bound(home: Home, tmp_path: Path):
    async def test() -> None:
        worker = await home.prepared(timeouts=HASTY, ignore_sigterm=True)
        gate = StepGate(tmp_path / "gate")
        await worker.start_training(home.training(fork=2, gate=str(gate)))
        await until(lambda: gate.is_reached(1))
        assert len(session_members(worker.pid)) == 3

        async with asyncio.timeout(10):
            end = await worker.stop()

        assert (end.signal, end.asked) == ("SIGKILL", True)
        assert session_members(worker.pid) == []

    bounded(test())


def test_forked_children_do_not_hide_a_death_or_outlive_it(home: Home, tmp_path: Path):
    async def test() -> None:
        worker = await home.prepared()
        gate = StepGate(tmp_path / "gate")
        await worker.start_training(home.training(fork=3, gate=str(gate)))
        await until(lambda: gate.is_reached(1))
        watch = asyncio.create_task(raised_by(events_of(worker)))
        assert len(session_members(worker.pid)) == 4

        os.kill(worker.pid, signal.SIGKILL)
        async with asyncio.timeout(10):
            assert_died(await watch, signal="SIGKILL")

        assert session_members(worker.pid) == []
        await worker.stop()

    bounded(test())


def test_a_signal_to_a_forked_child_ends_the_child_and_not_the_worker(home: Home, tmp_path: Path):
    async def test() -> None:
        worker = await home.prepared()
        gate = StepGate(tmp_path / "gate")
        await worker.start_training(home.training(fork=1, gate=str(gate), steps=2))
        await until(lambda: gate.is_reached(1))
        (child,) = set(session_members(worker.pid)) - {worker.pid}

        os.kill(child, signal.SIGTERM)
        await until(lambda: session_members(worker.pid) == [worker.pid])
        gate.open_all()

        assert kinds(await events_of(worker))[-1] == "succeeded"
        await worker.stop()

    bounded(test())


@pytest.mark.parametrize("how", ["Shutdown", "SIGTERM"])
def test_an_end_during_a_training_cancels_it_at_the_step_boundary(home: Home, tmp_path: Path, how: str):
    async def test() -> None:
        worker = await home.prepared()
        gate = StepGate(tmp_path / "gate")
        request = home.training(step_gate=str(gate), steps=100)
        await worker.start_training(request)
        watch = asyncio.create_task(events_of(worker))
        gate.open(1, 2)
        await until(lambda: gate.is_reached(3))
        if how == "SIGTERM":
            os.kill(worker.pid, signal.SIGTERM)
            end = asyncio.create_task(worker.exited())
        else:
            end = asyncio.create_task(worker.stop())
        await until(lambda: f"ending: asked by {how}" in home.log_of())
        refused = await raised_by(worker.start_training(home.training("other")))
        assert isinstance(refused, PreconditionError)
        assert not end.done()
        gate.open_all()

        events = await watch
        assert [event.step.step for event in events if event.HasField("step")] == [1, 2, 3]
        assert events[-1].cancelled.step == 3
        assert (await end).exit_code == 0
        log = [entry.event for entry in EventLogReader(Path(request.training_dir) / "events.binpb").read()]
        assert log == events
        await worker.stop()

    bounded(test())


def test_a_pause_that_is_under_way_stays_one_when_the_worker_is_asked_to_end(home: Home, tmp_path: Path):
    async def test() -> None:
        worker = await home.prepared()
        gate = StepGate(tmp_path / "gate")
        await worker.start_training(home.training(step_gate=str(gate), steps=100))
        watch = asyncio.create_task(events_of(worker))
        gate.open(1)
        await until(lambda: gate.is_reached(2))
        await worker.pause("t")
        ending = asyncio.create_task(worker.stop())
        await until(lambda: "ending: asked by Shutdown" in home.log_of())
        gate.open_all()
        assert (await watch)[-1].state_changed.state == Training.STATE_PAUSED
        await ending

    bounded(test())


def test_a_stop_while_loading_or_importing_does_not_wait(home: Home, tmp_path: Path):
    async def test() -> None:
        importing = await home.launcher(import_gate=tmp_path / "never").launch("importing", device_map="")
        assert (await importing.stop()).exit_code == 0
        loading = await home.launcher(model={"load_gate": str(tmp_path / "never")}).launch("loading", device_map="")
        load = loading.load(messages.LoadModelRequest(source="x"))
        while (await anext(load)).progress.phase != LoadProgress.PHASE_LOADING_WEIGHTS:
            pass
        assert (await loading.stop()).exit_code == 0

    bounded(test(), seconds=20)


def test_the_lock_keeps_a_second_worker_out_of_a_folder(home: Home):
    async def test() -> None:
        worker = await home.loaded()
        directory = home.path / "workers" / "m"
        assert lock_holder(directory / "worker.lock") == worker.pid

        second = await asyncio.to_thread(
            subprocess.run, [*fake_worker_command(), str(directory)], capture_output=True, text=True, timeout=30
        )

        assert second.returncode == 65
        assert "another worker lives in" in second.stderr
        assert (await worker.status()).pid == worker.pid
        await worker.stop()
        assert lock_holder(directory / "worker.lock") is None

    bounded(test())


@pytest.mark.parametrize("gone", ["workers/m", "."])
def test_a_worker_whose_folder_or_home_is_gone_ends_itself_with_its_children(home: Home, tmp_path: Path, gone: str):
    async def test() -> None:
        worker = await home.prepared()
        gate = StepGate(tmp_path / "gate")
        await worker.start_training(home.training(fork=1, gate=str(gate)))
        await until(lambda: gate.is_reached(1))

        shutil.rmtree(home.path / gone)

        async with asyncio.timeout(10):
            await worker.exited()
        assert session_members(worker.pid) == []

    bounded(test())


def test_a_worker_outlives_its_server_and_the_next_one_finds_it_where_it_is(home: Home, tmp_path: Path):
    gate = StepGate(tmp_path / "gate")
    pids: list[int] = []

    async def first_server() -> None:
        worker = await home.prepared()
        await worker.start_training(home.training(steps=4, gate=str(gate)))
        gate.open(1)
        await at_step(worker, 1)
        pids.append(worker.pid)
        await worker.detach()

    async def second_server() -> None:
        (worker,) = home.launcher().attach_living()
        assert (worker.model_id, worker.pid) == ("m", pids[0])
        gate.open_all()
        events = await events_of(worker)
        assert [event.sequence for event in events] == list(range(1, 9))
        end = await worker.stop()
        assert (end.exit_code, end.asked) == (0, True)
        assert home.launcher().attach_living() == []

    bounded(first_server())
    bounded(second_server())


def test_a_launch_ends_what_an_earlier_server_left_in_the_models_folder(home: Home):
    pids: list[int] = []

    async def first_server() -> None:
        worker = await home.loaded()
        pids.append(worker.pid)
        await worker.detach()

    async def second_server() -> None:
        worker = await home.loaded()
        assert worker.pid != pids[0]
        assert session_members(pids[0]) == []
        await worker.stop()

    bounded(first_server())
    bounded(second_server())


def test_a_bootstrap_of_another_version_is_refused_in_words(home: Home, tmp_path: Path):
    async def test() -> None:
        worker = await home.loaded()
        directory = tmp_path / "other"
        shutil.copytree(home.path / "workers" / "m", directory, ignore=shutil.ignore_patterns("worker.sock"))
        (directory / "bootstrap.binpb").write_bytes(WorkerBootstrap(bootstrap_version=2).SerializeToString())
        refused = await asyncio.to_thread(
            subprocess.run, [*fake_worker_command(), str(directory)], capture_output=True, text=True, timeout=30
        )
        assert refused.returncode == 64
        assert "server and worker must be of one release" in refused.stderr
        await worker.stop()

    bounded(test())
