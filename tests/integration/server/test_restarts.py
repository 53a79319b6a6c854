"""A server that comes back: what trained goes on, what was asked is finished, and no event is lost or doubled."""

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import grpc
import psutil
import pytest

from doubles.fake_worker import fake_row
from doubles.gates import StepGate
from support.calls import CALL_SECONDS, inline, load, prepare, prepared_model, train, watch
from support.running_server import RunningServer, a_model
from support.waiting import wait_until
from unslothd.v1 import service_pb2 as pb
from unslothd.v1.model_pb2 import Model
from unslothd.v1.service_pb2_grpc import UnslothServiceStub
from unslothd.v1.training_event_pb2 import TrainingEvent
from unslothd.v1.training_pb2 import Training, TrainingConfig
from unslothd_server.event_log import EventLogReader


class Scene:
    """A server with one prepared model; it can be ended and started anew on the same folders."""

    def __init__(self, folder: Path, *arguments: str, heeds_modes: bool = False) -> None:
        self._folder = folder
        self._arguments = arguments
        self._heeds_modes = heeds_modes
        self.server = self._start()
        a_model(self.server, "tiny")
        self.model = prepare(self.stub, load(self.stub, "tiny").model_id, TrainingConfig(save_steps=1))

    def _start(self) -> RunningServer:
        server = RunningServer(
            self._folder, fake_workers=True, arguments=self._arguments, heeds_modes=self._heeds_modes
        )
        self.stub: UnslothServiceStub = server.stub()
        return server

    def train(self, **knobs: object) -> Iterator[TrainingEvent]:
        return train(self.stub, self.model.model_id, inline([fake_row(**knobs)]))

    def workers(self) -> list[psutil.Process]:
        return psutil.Process(self.server.process.pid).children(recursive=True)

    def kill_and_start(self) -> None:
        self.server.kill()
        self._close_pipe()
        self.server = self._start()

    def stop_and_start(self) -> None:
        assert self.server.stop() == 0
        self._close_pipe()
        self.server = self._start()

    def _close_pipe(self) -> None:
        assert self.server.process.stdout is not None
        self.server.process.stdout.close()

    def get(self, training_id: str) -> Training:
        return self.stub.GetTraining(pb.GetTrainingRequest(training_id=training_id), timeout=CALL_SECONDS).training

    def __enter__(self) -> "Scene":
        return self

    def __exit__(self, *_: object) -> None:
        models = self.stub.ListModels(pb.ListModelsRequest(), timeout=CALL_SECONDS).models
        for model in models:
            request = pb.UnloadModelRequest(model_id=model.model_id, force=True)
            self.stub.UnloadModel(request, timeout=CALL_SECONDS)
        self.server.__exit__(None, None, None)


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    with Scene(tmp_path) as scene:
        yield scene


def until_step(events: Iterator[TrainingEvent], step: int) -> str:
    return next(event.training_id for event in events if event.step.step == step)


def steps(events: list[TrainingEvent]) -> list[int]:
    assert [event.sequence for event in events] == list(range(1, len(events) + 1))
    return [event.step.step for event in events if event.HasField("step")]


def test_a_killed_servers_training_runs_on_and_the_next_server_shows_all_of_it(scene: Scene, gate: StepGate):
    training_id = until_step(scene.train(steps=4, gate=_opened(gate, 1, 2)), 2)
    (worker,) = scene.workers()
    scene.kill_and_start()
    assert worker.is_running()
    assert scene.get(training_id).state == Training.STATE_RUNNING
    gate.open_all()
    events = list(watch(scene.stub, training_id))
    assert steps(events) == [1, 2, 3, 4]
    assert events[-1].HasField("succeeded")
    assert not [event for event in events if event.HasField("recovery")]
    assert worker.is_running()  # it holds the model for the next training
    assert list(scene.train(steps=1))[-1].HasField("succeeded")


def test_what_a_worker_finished_while_no_server_ran_is_shown(scene: Scene, gate: StepGate):
    events = scene.train(steps=2, gate=str(gate))
    training_id = next(events).training_id
    until_started(events)
    (worker,) = scene.workers()
    scene.server.kill()
    gate.open_all()
    wait_for(scene.server.output_root / "unsloth_finetuned_model" / "final")
    scene.kill_and_start()
    log = list(watch(scene.stub, training_id))
    assert steps(log) == [1, 2]
    assert log[-1].HasField("succeeded")
    assert worker.is_running()


def test_a_worker_that_died_while_no_server_ran_is_replaced_and_its_training_resumed(scene: Scene, gate: StepGate):
    training_id = until_step(scene.train(steps=4, gate=_opened(gate, 1, 2)), 2)
    (worker,) = scene.workers()
    scene.server.kill()
    worker.kill()
    psutil.wait_procs([worker], timeout=CALL_SECONDS)
    gate.open_all()
    scene.kill_and_start()
    events = list(watch(scene.stub, training_id))
    assert steps(events) in ([1, 2, 3, 4], [1, 2, 2, 3, 4])  # step 2's checkpoint may not have been there yet
    recoveries = [event.recovery for event in events if event.HasField("recovery")]
    assert [each.attempt for each in recoveries] == [1]
    assert "gone when the server started" in recoveries[0].cause.message
    assert events[-1].HasField("succeeded")


def test_what_a_worker_learnt_while_no_server_ran_is_what_its_successor_starts_from(scene: Scene, gate: StepGate):
    until_started(scene.train(steps=2, gate=str(gate)))
    (worker,) = scene.workers()
    scene.server.kill()
    gate.open_all()
    final = scene.server.output_root / "unsloth_finetuned_model" / "final"
    (log,) = scene.server.home.glob("trainings/*/events.binpb")
    wait_until(lambda: any(entry.event.HasField("succeeded") for entry in EventLogReader(log).read()))
    worker.kill()
    psutil.wait_procs([worker], timeout=CALL_SECONDS)
    scene.kill_and_start()
    state = json.loads((scene.server.home / "models" / f"{scene.model.model_id}.json").read_text())
    assert state["prepare"]["weights_from"] == str(final)


def test_a_worker_that_is_killed_in_a_training_is_replaced_and_the_log_says_so(scene: Scene, tmp_path: Path):
    events = list(scene.train(steps=5, die_at_step=4, die_once=str(tmp_path / "died")))
    assert steps(events) == [1, 2, 3, 4, 5]
    (recovery,) = [event.recovery for event in events if event.HasField("recovery")]
    assert (recovery.attempt, recovery.resume_step) == (1, 3)
    assert "SIGKILL" in recovery.cause.message
    started = [event.started for event in events if event.HasField("started")]
    assert [(each.resumed, each.first_step) for each in started] == [(False, 1), (True, 4)]


def test_a_training_that_hangs_gets_another_worker(tmp_path: Path):
    with Scene(tmp_path, "--stall-seconds", "2") as scene:
        events = list(scene.train(steps=3, die_at_step=2, die="hang", die_once=str(tmp_path / "hung")))
        assert steps(events) == [1, 2, 3]
        (recovery,) = [event.recovery for event in events if event.HasField("recovery")]
        assert "did nothing for 2 s after step 1" in recovery.cause.message
        assert events[-1].HasField("succeeded")


def test_a_training_that_is_only_slow_is_left_alone(tmp_path: Path):
    with Scene(tmp_path, "--stall-seconds", "2") as scene:
        events = list(scene.train(steps=5, step_seconds=1))
        assert not [event for event in events if event.HasField("recovery")]
        assert events[-1].HasField("succeeded")


def test_trainings_that_waited_keep_their_order_over_a_restart(scene: Scene, gate: StepGate):
    running = until_step(scene.train(steps=2, gate=_opened(gate, 1)), 1)
    waiting = [next(scene.train(steps=1)).training_id for _ in range(3)]
    scene.kill_and_start()
    assert [scene.get(each).queue_position for each in waiting] == [1, 2, 3]
    gate.open_all()
    for training_id in (running, *waiting):
        assert list(watch(scene.stub, training_id))[-1].HasField("succeeded")
    begun = [scene.get(each).start_time.ToNanoseconds() for each in (running, *waiting)]
    assert begun == sorted(begun)


def test_loaded_models_come_back_as_they_were(scene: Scene):
    scene.stub.LoadModel(pb.LoadModelRequest(model_name="tiny", request_id="again"), timeout=CALL_SECONDS)
    second = load(scene.stub, "tiny", request_id="again")
    workers = {worker.pid for worker in scene.workers()}
    scene.kill_and_start()
    models = scene.stub.ListModels(pb.ListModelsRequest(), timeout=CALL_SECONDS).models
    assert [(each.model_id, each.state) for each in models] == [
        (scene.model.model_id, Model.STATE_PREPARED),
        (second.model_id, Model.STATE_READY),
    ]
    assert models[0].lora == scene.model.lora
    assert load(scene.stub, "tiny", request_id="again").model_id == second.model_id
    assert all(psutil.pid_exists(pid) for pid in workers)


def test_an_idle_model_whose_worker_died_with_the_server_is_loaded_again(scene: Scene):
    (worker,) = scene.workers()
    scene.server.kill()
    worker.kill()
    psutil.wait_procs([worker], timeout=CALL_SECONDS)
    scene.kill_and_start()
    assert list(scene.train(steps=1))[-1].HasField("succeeded")
    back = scene.stub.GetModel(pb.GetModelRequest(model_id=scene.model.model_id), timeout=CALL_SECONDS).model
    assert (back.state, back.lora) == (Model.STATE_PREPARED, scene.model.lora)


def test_a_paused_training_stays_paused_over_a_restart_and_goes_on_when_asked(scene: Scene, gate: StepGate):
    training_id = until_step(scene.train(steps=3, gate=_opened(gate, 1)), 1)
    scene.stub.PauseTraining(pb.PauseTrainingRequest(training_id=training_id), timeout=CALL_SECONDS)
    next(e for e in watch(scene.stub, training_id) if e.state_changed.state == Training.STATE_PAUSED)
    gate.open_all()
    scene.kill_and_start()
    assert scene.get(training_id).state == Training.STATE_PAUSED
    model = scene.stub.GetModel(pb.GetModelRequest(model_id=scene.model.model_id), timeout=CALL_SECONDS).model
    assert model.state == Model.STATE_SUSPENDED
    scene.stub.ResumeTraining(pb.ResumeTrainingRequest(training_id=training_id), timeout=CALL_SECONDS)
    assert steps(list(watch(scene.stub, training_id))) == [1, 2, 3]


def test_a_stop_in_order_pauses_what_trains_and_the_next_start_goes_on(scene: Scene, gate: StepGate):
    training_id = until_step(scene.train(steps=4, gate=_opened(gate, 1, 2)), 2)
    workers = scene.workers()
    assert scene.server.stop() == 0
    assert not [worker for worker in workers if worker.is_running()]
    gate.open_all()
    scene.stop_and_start()
    events = list(watch(scene.stub, training_id))
    assert steps(events) == [1, 2, 3, 4]
    states = [event.state_changed.state for event in events if event.HasField("state_changed")]
    assert Training.STATE_PAUSED in states
    assert events[-1].HasField("succeeded")


def test_a_training_that_a_user_was_pausing_when_the_server_stopped_stays_paused(scene: Scene, gate: StepGate):
    events = scene.train(steps=9, step_gate=_opened(gate, 1))
    training_id = until_step(events, 1)
    scene.stub.PauseTraining(pb.PauseTrainingRequest(training_id=training_id), timeout=CALL_SECONDS)
    scene.server.process.send_signal(signal.SIGINT)
    with pytest.raises(grpc.RpcError):  # the server stops: by now it has looked at what runs
        list(events)
    gate.open_all()
    assert scene.server.process.wait(CALL_SECONDS) == 0
    scene.kill_and_start()
    assert scene.get(training_id).state == Training.STATE_PAUSED
    scene.stub.ResumeTraining(pb.ResumeTrainingRequest(training_id=training_id), timeout=CALL_SECONDS)
    assert list(watch(scene.stub, training_id))[-1].HasField("succeeded")


def test_a_stop_that_lets_trainings_go_on_leaves_the_worker_to_the_next_server(tmp_path: Path, gate: StepGate):
    with Scene(tmp_path, "--on-shutdown", "continue") as scene:
        training_id = until_step(scene.train(steps=4, gate=_opened(gate, 1, 2)), 2)
        (worker,) = scene.workers()
        scene.stop_and_start()
        assert worker.is_running()
        gate.open_all()
        events = list(watch(scene.stub, training_id))
        assert steps(events) == [1, 2, 3, 4]
        assert not [event for event in events if event.state_changed.state == Training.STATE_PAUSED]


def test_a_cancel_that_the_server_died_over_is_carried_out(scene: Scene, gate: StepGate):
    training_id = until_step(scene.train(steps=9, step_gate=_opened(gate, 1)), 1)
    # The step gate makes the worker deaf to the stop until its step ends; the server dies in the meantime.
    request = pb.CancelTrainingRequest(training_id=training_id, save_checkpoint=True)
    scene.stub.CancelTraining(request, timeout=CALL_SECONDS)
    scene.kill_and_start()
    gate.open_all()
    assert list(watch(scene.stub, training_id))[-1].HasField("cancelled")


def test_a_request_id_means_the_same_training_after_a_restart(scene: Scene):
    def request() -> pb.TrainRequest:
        rows = inline([fake_row(steps=1)])
        return pb.TrainRequest(model_id=scene.model.model_id, train_dataset=rows, request_id="once")

    first = [response.event for response in scene.stub.Train(request(), timeout=CALL_SECONDS)]
    scene.kill_and_start()
    again = [response.event for response in scene.stub.Train(request(), timeout=CALL_SECONDS)]
    assert again == first


def test_a_server_without_models_leaves_nothing_for_the_next_one(tmp_path: Path):
    with RunningServer(tmp_path, fake_workers=True) as server:
        a_model(server, "tiny")
        with prepared_model(server.stub(), "tiny"):
            pass
        assert list((server.home / "models").iterdir()) == []


def _opened(gate: StepGate, *numbers: int) -> str:
    gate.open(*numbers)
    return str(gate)


def until_started(events: Iterator[TrainingEvent]) -> None:
    next(event for event in events if event.HasField("started"))


def wait_for(path: Path) -> None:
    """Waits, bounded, for a file of a process that no server watches."""
    with psutil.Popen(["timeout", "60", "sh", "-c", f"until [ -e '{path}' ]; do sleep 0.05; done"]) as waiting:
        assert waiting.wait(90) == 0
