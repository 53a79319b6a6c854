"""Pausing and going on over gRPC: the device is freed, the place is kept, and the log goes on without a gap."""

from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from doubles.fake_worker import fake_row
from doubles.gates import StepGate
from support.calls import CALL_SECONDS, error_of, inline, load, prepare, prepared_model, train, watch
from support.running_server import RunningServer
from support.waiting import wait_until
from unslothd.v1 import service_pb2 as pb
from unslothd.v1.model_pb2 import LoraConfig, Model
from unslothd.v1.service_pb2_grpc import UnslothServiceStub
from unslothd.v1.training_event_pb2 import TrainingEvent
from unslothd.v1.training_pb2 import Training, TrainingConfig


def pause(stub: UnslothServiceStub, training_id: str) -> Training:
    return stub.PauseTraining(pb.PauseTrainingRequest(training_id=training_id), timeout=CALL_SECONDS).training


def resume(stub: UnslothServiceStub, training_id: str, step: int = 0) -> Training:
    request = pb.ResumeTrainingRequest(training_id=training_id, checkpoint_step=step)
    return stub.ResumeTraining(request, timeout=CALL_SECONDS).training


def get(stub: UnslothServiceStub, training_id: str) -> Training:
    return stub.GetTraining(pb.GetTrainingRequest(training_id=training_id), timeout=CALL_SECONDS).training


def get_model(stub: UnslothServiceStub, model_id: str) -> Model:
    return stub.GetModel(pb.GetModelRequest(model_id=model_id), timeout=CALL_SECONDS).model


def cancel(stub: UnslothServiceStub, training_id: str) -> Training:
    return stub.CancelTraining(pb.CancelTrainingRequest(training_id=training_id), timeout=CALL_SECONDS).training


def until(events: Iterator[TrainingEvent], state: "Training.State.ValueType") -> TrainingEvent:
    return next(event for event in events if event.state_changed.state == state)


def until_step(events: Iterator[TrainingEvent], step: int) -> TrainingEvent:
    return next(event for event in events if event.step.step == step)


def suspended(stub: UnslothServiceStub, model_id: str) -> None:
    """Waits until the worker of a model has ended: a moment after PAUSED is in the log."""

    def is_free() -> bool:
        model = get_model(stub, model_id)
        return model.state == Model.STATE_SUSPENDED and not model.memory_bytes

    wait_until(is_free)


def test_a_pause_saves_frees_the_device_and_a_resume_goes_on_to_the_end_in_one_log(
    server: RunningServer, stub: UnslothServiceStub, model: Model, gate: StepGate
):
    events = train(stub, model.model_id, inline([fake_row(steps=5, gate=str(gate))]))
    gate.open(1, 2)
    training_id = until_step(events, 2).training_id
    assert pause(stub, training_id).state in {Training.STATE_PAUSING, Training.STATE_PAUSED}
    until(events, Training.STATE_PAUSED)
    paused = get(stub, training_id)
    assert (paused.state, paused.step) == (Training.STATE_PAUSED, 2)
    assert [checkpoint.step for checkpoint in paused.checkpoints] == [2]
    suspended(stub, model.model_id)
    assert psutil.Process(server.process.pid).children() == []
    gate.open_all()
    assert resume(stub, training_id).state in {Training.STATE_QUEUED, Training.STATE_RUNNING}
    assert list(events)[-1].HasField("succeeded")  # the stream of Train stayed open over the pause
    log = list(watch(stub, training_id))
    assert [event.sequence for event in log] == list(range(1, len(log) + 1))
    assert [event.step.step for event in log if event.HasField("step")] == [1, 2, 3, 4, 5]
    started = [event.started for event in log if event.HasField("started")]
    assert [(each.resumed, each.first_step) for each in started] == [(False, 1), (True, 3)]
    assert get_model(stub, model.model_id).state == Model.STATE_PREPARED


def test_pausing_is_idempotent_and_a_paused_training_is_resumed_once(
    stub: UnslothServiceStub, model: Model, gate: StepGate
):
    events = train(stub, model.model_id, inline([fake_row(steps=3, gate=str(gate))]))
    gate.open(1)
    training_id = until_step(events, 1).training_id
    pause(stub, training_id)
    pause(stub, training_id)
    until(events, Training.STATE_PAUSED)
    assert pause(stub, training_id).state == Training.STATE_PAUSED
    gate.open_all()
    resume(stub, training_id)
    resume(stub, training_id)
    assert list(events)[-1].HasField("succeeded")
    started = [event for event in watch(stub, training_id) if event.HasField("started")]
    assert len(started) == 2


def test_trainings_behind_a_paused_one_wait_until_it_is_over(stub: UnslothServiceStub, model: Model, gate: StepGate):
    first = train(stub, model.model_id, inline([fake_row(steps=3, gate=str(gate))]))
    gate.open(1)
    first_id = until_step(first, 1).training_id
    second = train(stub, model.model_id, inline([fake_row(steps=1)]))
    second_id = next(second).training_id
    pause(stub, first_id)
    until(first, Training.STATE_PAUSED)
    suspended(stub, model.model_id)
    assert (get(stub, second_id).state, get(stub, second_id).queue_position) == (Training.STATE_QUEUED, 1)
    third = train(stub, model.model_id, inline([fake_row(steps=1)]))
    assert next(third).state_changed.queue_position == 2
    assert cancel(stub, first_id).state == Training.STATE_CANCELLED
    for events in (second, third):
        assert list(events)[-1].HasField("succeeded")


def test_a_queued_training_is_paused_at_once_and_goes_to_the_end_of_the_queue(
    stub: UnslothServiceStub, model: Model, gate: StepGate
):
    running = train(stub, model.model_id, inline([fake_row(steps=1, gate=str(gate))]))
    next(running)
    waiting = train(stub, model.model_id, inline([fake_row(steps=1)]))
    waiting_id = next(waiting).training_id
    assert pause(stub, waiting_id).state == Training.STATE_PAUSED
    last = train(stub, model.model_id, inline([fake_row(steps=1)]))
    assert next(last).state_changed.queue_position == 1
    gate.open_all()
    assert list(last)[-1].HasField("succeeded")
    resume(stub, waiting_id)
    assert list(waiting)[-1].HasField("succeeded")


def test_a_suspended_model_refuses_text_and_says_what_brings_it_back(
    stub: UnslothServiceStub, model: Model, gate: StepGate
):
    events = train(stub, model.model_id, inline([fake_row(steps=3, gate=str(gate))]))
    gate.open(1)
    pause(stub, until_step(events, 1).training_id)
    until(events, Training.STATE_PAUSED)
    suspended(stub, model.model_id)
    error = error_of(lambda: stub.Generate(pb.GenerateRequest(model_id=model.model_id, prompt="a")))
    assert (error.code, error.reason) == ("FAILED_PRECONDITION", "MODEL_NOT_READY")
    assert "ResumeTraining" in error.message
    refused = error_of(lambda: stub.UnloadModel(pb.UnloadModelRequest(model_id=model.model_id)))
    assert refused.reason == "MODEL_BUSY"


@pytest.mark.parametrize("end", ["cancelled", "succeeded"])
def test_what_is_over_cannot_be_paused(end: str, stub: UnslothServiceStub, model: Model, gate: StepGate):
    events = train(stub, model.model_id, inline([fake_row(steps=1, gate=str(gate))]))
    training_id = next(events).training_id
    if end == "cancelled":
        cancel(stub, training_id)
    else:
        gate.open_all()
    assert list(watch(stub, training_id))[-1].WhichOneof("kind") == end
    error = error_of(lambda: stub.PauseTraining(pb.PauseTrainingRequest(training_id=training_id)))
    assert (error.code, error.reason) == ("FAILED_PRECONDITION", "TRAINING_STATE")
    assert end in error.message


def test_a_succeeded_training_is_not_resumed_and_the_text_says_how_to_train_on(stub: UnslothServiceStub, model: Model):
    *_, last = train(stub, model.model_id, inline([fake_row(steps=1)]))
    training_id = last.training_id
    error = error_of(lambda: stub.ResumeTraining(pb.ResumeTrainingRequest(training_id=training_id)))
    assert (error.code, error.reason) == ("FAILED_PRECONDITION", "TRAINING_STATE")
    assert f"training:{training_id}" in error.message


def test_a_failed_training_goes_on_from_the_checkpoint_that_is_named_in_the_same_log(
    stub: UnslothServiceStub, model: Model, tmp_path: Path
):
    rows = inline([fake_row(steps=6, die_at_step=6, die="out_of_memory", die_once=str(tmp_path / "died"))])
    request = pb.TrainRequest(model_id=model.model_id, train_dataset=rows, training_config=TrainingConfig(save_steps=2))
    assert error_of(lambda: stub.Train(request, timeout=CALL_SECONDS)).reason == "OUT_OF_MEMORY"
    training = stub.ListTrainings(pb.ListTrainingsRequest(model_id=model.model_id)).trainings[0]
    assert [each.step for each in training.checkpoints] == [2, 4]
    missing = error_of(
        lambda: stub.ResumeTraining(pb.ResumeTrainingRequest(training_id=training.training_id, checkpoint_step=3))
    )
    assert (missing.code, missing.reason) == ("NOT_FOUND", "CHECKPOINT_NOT_FOUND")
    assert "2, 4" in missing.message
    resume(stub, training.training_id, step=2)
    events = list(watch(stub, training.training_id))
    assert [event.sequence for event in events] == list(range(1, len(events) + 1))
    assert [event.step.step for event in events if event.HasField("step")] == [1, 2, 3, 4, 5, 3, 4, 5, 6]
    done = get(stub, training.training_id)
    assert (done.state, done.HasField("error")) == (Training.STATE_SUCCEEDED, False)
    assert [each.step for each in done.checkpoints] == [2, 4, 6]


def test_a_training_without_a_checkpoint_is_not_resumed(stub: UnslothServiceStub, model: Model):
    request = pb.TrainRequest(
        model_id=model.model_id, train_dataset=inline([fake_row(steps=2, die_at_step=1, die="out_of_memory")])
    )
    error_of(lambda: stub.Train(request, timeout=CALL_SECONDS))
    training = stub.ListTrainings(pb.ListTrainingsRequest(model_id=model.model_id)).trainings[0]
    error = error_of(lambda: stub.ResumeTraining(pb.ResumeTrainingRequest(training_id=training.training_id)))
    assert (error.code, error.reason) == ("NOT_FOUND", "CHECKPOINT_NOT_FOUND")
    assert "Train" in error.message


def test_a_cancelled_training_is_resumed_after_its_model_was_unloaded(stub: UnslothServiceStub, gate: StepGate):
    with prepared_model(stub, "tiny") as model:
        events = train(stub, model.model_id, inline([fake_row(steps=4, gate=str(gate))]))
        gate.open(1, 2)
        training_id = until_step(events, 2).training_id
        request = pb.CancelTrainingRequest(training_id=training_id, save_checkpoint=True)
        stub.CancelTraining(request, timeout=CALL_SECONDS)
        list(watch(stub, training_id))
    gate.open_all()
    resume(stub, training_id)
    assert list(watch(stub, training_id))[-1].HasField("succeeded")
    back = get_model(stub, model.model_id)
    assert (back.state, back.lora.r) == (Model.STATE_PREPARED, model.lora.r)
    stub.UnloadModel(pb.UnloadModelRequest(model_id=model.model_id), timeout=CALL_SECONDS)


def test_a_training_is_not_resumed_on_another_model_of_the_same_id(stub: UnslothServiceStub, gate: StepGate):
    with prepared_model(stub, "tiny") as model:
        events = train(stub, model.model_id, inline([fake_row(steps=4, gate=str(gate))]))
        gate.open(1)
        training_id = until_step(events, 1).training_id
        request = pb.CancelTrainingRequest(training_id=training_id, save_checkpoint=True)
        stub.CancelTraining(request, timeout=CALL_SECONDS)
        list(watch(stub, training_id))
    other = load(stub, "tiny")
    try:
        prepare(stub, other.model_id, lora=LoraConfig(r=99))
        error = error_of(lambda: stub.ResumeTraining(pb.ResumeTrainingRequest(training_id=training_id)))
        assert (error.code, error.reason) == ("ALREADY_EXISTS", "MODEL_ID_TAKEN")
    finally:
        stub.UnloadModel(pb.UnloadModelRequest(model_id=other.model_id), timeout=CALL_SECONDS)


def test_a_plan_counts_without_leaving_anything_behind(server: RunningServer, stub: UnslothServiceStub, model: Model):
    before = sorted(path.name for path in (server.home / "trainings").iterdir())
    request = pb.PlanTrainingRequest(
        model_id=model.model_id, train_dataset=inline([{"text": "a"}] * 7), preview_rows=2, measure=True
    )
    plan = stub.PlanTraining(request, timeout=CALL_SECONDS).plan
    assert (plan.num_rows, len(plan.preview), plan.memory_measured) == (7, 2, True)
    assert plan.config.batch_size == 2
    assert sorted(path.name for path in (server.home / "trainings").iterdir()) == before


def test_a_plan_is_refused_while_a_training_runs(stub: UnslothServiceStub, model: Model, gate: StepGate):
    events = train(stub, model.model_id, inline([fake_row(steps=1, gate=str(gate))]))
    until(events, Training.STATE_RUNNING)
    request = pb.PlanTrainingRequest(model_id=model.model_id, train_dataset=inline([{"text": "a"}]))
    error = error_of(lambda: stub.PlanTraining(request))
    assert (error.code, error.reason) == ("FAILED_PRECONDITION", "MODEL_BUSY")
    gate.open_all()
    list(events)
