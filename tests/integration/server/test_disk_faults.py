"""Disks that fail under real processes: nothing from before is lost, the error says what to do, and it goes on after.

A full disk is made by RLIMIT_FSIZE on the running process: the kernel refuses every byte behind the limit, on any file
system and for any user, and the limit can be lifted again. A read-only folder is one whose mode says so, for a server
that has not got root's right to ignore it.
"""

import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from doubles.fake_worker import fake_row
from doubles.gates import StepGate
from support.calls import CALL_SECONDS, error_of, inline, watch
from support.heeding_modes import heeding_modes
from support.running_server import WITH_FAKE_WORKERS
from support.uploads import upload
from support.waiting import wait_until
from unslothd.v1 import service_pb2 as pb
from unslothd.v1.training_event_pb2 import TrainingEvent
from unslothd.v1.training_pb2 import Training

from .test_restarts import Scene, steps, until_step


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    with Scene(tmp_path) as scene:
        yield scene


def fill_disk_of(process: psutil.Process) -> None:
    process.rlimit(psutil.RLIMIT_FSIZE, (1, resource.RLIM_INFINITY))


def free_disk_of(process: psutil.Process) -> None:
    process.rlimit(psutil.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def server_of(scene: Scene) -> psutil.Process:
    return psutil.Process(scene.server.process.pid)


def at_step_2(scene: Scene, gate: StepGate) -> str:
    """Starts a training of 5 steps; returns its id when it waits at the gate of the third."""
    gate.open(1, 2)
    training_id = until_step(scene.train(steps=5, gate=str(gate)), 2)
    wait_until(lambda: len(scene.get(training_id).checkpoints) == 2)
    return training_id


def so_far(scene: Scene, training_id: str) -> list[TrainingEvent]:
    last = scene.get(training_id).last_sequence
    events = watch(scene.stub, training_id)
    return [next(events) for _ in range(last)]


def resumed(scene: Scene, training_id: str) -> list[TrainingEvent]:
    scene.stub.ResumeTraining(pb.ResumeTrainingRequest(training_id=training_id), timeout=CALL_SECONDS)
    return list(watch(scene.stub, training_id))


def calls_that_write(scene: Scene) -> list[Callable[[], Any]]:
    rows = inline([fake_row(steps=1)])
    return [
        lambda: scene.stub.Train(
            pb.TrainRequest(model_id=scene.model.model_id, train_dataset=rows), timeout=CALL_SECONDS
        ),
        lambda: scene.stub.LoadModel(pb.LoadModelRequest(model_name="tiny"), timeout=CALL_SECONDS),
        lambda: upload(scene.stub, b'{"text": "a"}\n'),
    ]


def test_a_worker_whose_disk_is_full_fails_its_training_with_what_to_free_and_a_resume_goes_on(
    scene: Scene, gate: StepGate
):
    training_id = at_step_2(scene, gate)
    before = so_far(scene, training_id)
    (worker,) = scene.workers()
    fill_disk_of(worker)
    gate.open_all()
    failed = list(watch(scene.stub, training_id))
    assert failed[: len(before)] == before
    assert [event.WhichOneof("kind") for event in failed[len(before) :]] == ["failed"]
    assert "Free some space, then go on with ResumeTraining" in scene.get(training_id).error.message
    free_disk_of(worker)
    events = resumed(scene, training_id)
    assert events[: len(failed)] == failed
    assert steps(events) == [1, 2, 3, 4, 5]
    assert events[-1].HasField("succeeded")


def test_a_disk_that_is_full_for_all_keeps_no_watcher_waiting_and_no_number_is_used_twice(scene: Scene, gate: StepGate):
    training_id = at_step_2(scene, gate)
    (worker,) = scene.workers()
    watching = watch(scene.stub, training_id)
    fill_disk_of(worker)
    fill_disk_of(server_of(scene))
    gate.open_all()
    failed = list(watching)
    assert failed[-1].HasField("failed")
    assert list(watch(scene.stub, training_id)) == failed
    free_disk_of(worker)
    free_disk_of(server_of(scene))
    events = resumed(scene, training_id)
    assert events[: len(failed)] == failed
    assert steps(events) == [1, 2, 3, 4, 5]
    scene.kill_and_start()
    assert list(watch(scene.stub, training_id)) == events


def test_a_server_whose_disk_is_full_refuses_what_is_new_and_what_runs_goes_on(scene: Scene, gate: StepGate):
    training_id = at_step_2(scene, gate)
    fill_disk_of(server_of(scene))
    for call in calls_that_write(scene):
        error = error_of(call)
        assert (error.code, error.reason) == ("RESOURCE_EXHAUSTED", "DISK_FULL")
        assert "ree some space" in error.message
    assert len(scene.stub.ListModels(pb.ListModelsRequest(), timeout=CALL_SECONDS).models) == 1
    assert len(scene.workers()) == 1
    gate.open_all()
    events = list(watch(scene.stub, training_id))
    assert steps(events) == [1, 2, 3, 4, 5]
    assert events[-1].HasField("succeeded")
    free_disk_of(server_of(scene))
    assert list(scene.train(steps=1))[-1].HasField("succeeded")


def test_a_training_is_cancelled_although_the_disk_is_full(scene: Scene, gate: StepGate):
    training_id = at_step_2(scene, gate)
    fill_disk_of(server_of(scene))
    scene.stub.CancelTraining(pb.CancelTrainingRequest(training_id=training_id), timeout=CALL_SECONDS)
    assert list(watch(scene.stub, training_id))[-1].HasField("cancelled")
    free_disk_of(server_of(scene))


def test_a_torn_log_and_half_a_checkpoint_are_passed_over_at_the_next_start(scene: Scene, gate: StepGate):
    training_id = at_step_2(scene, gate)
    (worker,) = scene.workers()
    scene.server.kill()
    worker.kill()
    psutil.wait_procs([worker], timeout=CALL_SECONDS)
    with (scene.server.home / "trainings" / training_id / "events.binpb").open("ab") as log:
        log.write(b"\x40 a record that was not written to its end")
    (scene.server.output_root / "unsloth_finetuned_model" / "checkpoint-4").mkdir()
    gate.open_all()
    scene.kill_and_start()
    events = list(watch(scene.stub, training_id))
    assert steps(events) == [1, 2, 3, 4, 5]
    (recovery,) = [event.recovery for event in events if event.HasField("recovery")]
    assert recovery.resume_step == 2
    assert events[-1].HasField("succeeded")


def test_damaged_files_of_state_are_set_aside_and_named_and_the_server_starts(scene: Scene):
    *_, last = scene.train(steps=1)
    model = scene.server.home / "models" / "other.json"
    training = scene.server.home / "trainings" / "training-0" / "training.json"
    scene.server.kill()
    model.write_text("{ garbage")
    training.parent.mkdir()
    training.write_bytes(bytes(100))
    scene.kill_and_start()
    assert scene.get(last.training_id).state == Training.STATE_SUCCEEDED
    for path in (model, training):
        assert str(path) in scene.server.log.read_text()
        assert path.with_name(f"{path.name}.unreadable").exists()


def test_a_read_only_home_ends_the_start_with_what_to_do(tmp_path: Path):
    home = tmp_path / "home"
    home.mkdir(mode=0o500)
    command = [sys.executable, str(WITH_FAKE_WORKERS), "--listen", "127.0.0.1:0", "--home", str(home)]
    command += ["--output-root", str(tmp_path / "output")]
    done = subprocess.run(
        heeding_modes(command), capture_output=True, text=True, timeout=CALL_SECONDS, check=False, cwd=tmp_path
    )
    assert done.returncode == 1
    assert f"{home} cannot be written to" in done.stderr
    assert "Make it writable for the server's user, then start again" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_home_that_becomes_read_only_refuses_what_is_new_and_what_runs_goes_on(tmp_path: Path, gate: StepGate):
    with Scene(tmp_path, heeds_modes=True) as scene:
        training_id = at_step_2(scene, gate)
        folders = [scene.server.home, *(path for path in scene.server.home.iterdir() if path.is_dir())]
        for folder in folders:
            folder.chmod(0o500)
        try:
            for call in calls_that_write(scene):
                error = error_of(call)
                assert (error.code, error.reason) == ("FAILED_PRECONDITION", "NOT_WRITABLE")
                assert "Make it writable" in error.message
            gate.open_all()
            assert list(watch(scene.stub, training_id))[-1].HasField("succeeded")
        finally:
            for folder in folders:
                folder.chmod(0o700)
        assert list(scene.train(steps=1))[-1].HasField("succeeded")
