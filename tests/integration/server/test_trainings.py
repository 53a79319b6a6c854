"""Trainings over gRPC: events, watchers, the queue, stopping; and what goes wrong."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from doubles.fake_worker import fake_row
from doubles.gates import StepGate
from support.calls import CALL_SECONDS, error_of, inline, load, prepare, prepared_model, train, watch
from support.running_server import RunningServer
from unslothd.v1 import service_pb2 as pb
from unslothd.v1.model_pb2 import Model
from unslothd.v1.service_pb2_grpc import UnslothServiceStub
from unslothd.v1.training_event_pb2 import TrainingEvent
from unslothd.v1.training_pb2 import Training, TrainingConfig


@pytest.fixture(scope="module")
def model(stub: UnslothServiceStub) -> Iterator[Model]:
    with prepared_model(stub, "tiny") as model:
        yield model


def kinds(events: list[TrainingEvent]) -> list[str]:
    return [event.WhichOneof("kind") for event in events]


def get(stub: UnslothServiceStub, training_id: str) -> Training:
    return stub.GetTraining(pb.GetTrainingRequest(training_id=training_id), timeout=CALL_SECONDS).training


def cancel(stub: UnslothServiceStub, training_id: str, *, save_checkpoint: bool = False) -> Training:
    request = pb.CancelTrainingRequest(training_id=training_id, save_checkpoint=save_checkpoint)
    return stub.CancelTraining(request, timeout=CALL_SECONDS).training


def test_a_training_streams_every_event_from_acceptance_to_the_metrics(stub: UnslothServiceStub, model: Model):
    events = list(train(stub, model.model_id, inline([fake_row(steps=4)])))
    assert [event.sequence for event in events] == list(range(1, len(events) + 1))
    assert kinds(events)[:3] == ["state_changed", "state_changed", "started"]
    assert kinds(events).count("step") == 4
    assert kinds(events)[-1] == "succeeded"
    training = get(stub, events[0].training_id)
    assert (training.state, training.step, training.last_sequence) == (Training.STATE_SUCCEEDED, 4, len(events))
    assert training.metrics == events[-1].succeeded.metrics
    assert training.output_dir.endswith("/final")


def test_five_watchers_who_come_at_different_times_see_the_same_log(
    stub: UnslothServiceStub, model: Model, gate: StepGate
):
    rows = inline([fake_row(steps=6, gate=str(gate))])
    owner = train(stub, model.model_id, rows)
    first = next(owner)
    with ThreadPoolExecutor(5) as pool:
        watchers = []
        for step in range(1, 6):
            watchers.append(pool.submit(lambda: list(watch(stub, first.training_id))))
            gate.open(step)
        gate.open_all()
        logs = [watcher.result(CALL_SECONDS) for watcher in watchers]
    whole = [first, *owner]
    assert all(log == whole for log in logs)
    assert [event.sequence for event in whole] == list(range(1, len(whole) + 1))


def test_a_watcher_that_comes_back_gets_only_what_it_missed(stub: UnslothServiceStub, model: Model):
    events = list(train(stub, model.model_id, inline([fake_row(steps=5)])))
    training_id = events[0].training_id
    assert list(watch(stub, training_id, after_sequence=4)) == events[4:]
    assert list(watch(stub, training_id, after_sequence=len(events))) == []


def test_a_training_goes_on_when_its_caller_hangs_up(stub: UnslothServiceStub, model: Model, gate: StepGate):
    request = pb.TrainRequest(model_id=model.model_id, train_dataset=inline([fake_row(steps=2, gate=str(gate))]))
    call = stub.Train(request, timeout=CALL_SECONDS)
    training_id = next(call).event.training_id
    call.cancel()
    gate.open_all()
    assert kinds(list(watch(stub, training_id)))[-1] == "succeeded"


def test_hanging_up_cancels_when_that_was_asked(stub: UnslothServiceStub, model: Model, gate: StepGate):
    request = pb.TrainRequest(
        model_id=model.model_id,
        train_dataset=inline([fake_row(steps=50, gate=str(gate))]),
        disconnect_policy=pb.DISCONNECT_POLICY_CANCEL,
    )
    call = stub.Train(request, timeout=CALL_SECONDS)
    training_id = next(call).event.training_id
    call.cancel()
    assert kinds(list(watch(stub, training_id)))[-1] == "cancelled"


def test_an_override_at_train_wins_over_what_was_prepared(stub: UnslothServiceStub, model: Model):
    config = TrainingConfig(max_steps=2, learning_rate=3e-4)
    events = list(train(stub, model.model_id, inline([fake_row()]), training_config=config))
    training = get(stub, events[0].training_id)
    assert (training.total_steps, training.config.learning_rate, training.config.batch_size) == (2, 3e-4, 2)


def test_each_training_gets_a_folder_of_its_own(stub: UnslothServiceStub, model: Model):
    folders = {get(stub, next(train(stub, model.model_id, inline([fake_row(steps=1)]))).training_id).output_dir}
    folders.add(get(stub, next(train(stub, model.model_id, inline([fake_row(steps=1)]))).training_id).output_dir)
    assert len(folders) == 2


def test_a_chosen_folder_with_results_is_never_overwritten(stub: UnslothServiceStub, model: Model):
    config = TrainingConfig(output_dir="chosen/folder")
    list(train(stub, model.model_id, inline([fake_row(steps=1)]), training_config=config))
    error = error_of(lambda: train(stub, model.model_id, inline([fake_row(steps=1)]), training_config=config))
    assert (error.code, error.reason) == ("ALREADY_EXISTS", "OUTPUT_DIR_TAKEN")


def test_trainings_on_one_model_wait_in_turn_and_are_told_their_place(
    stub: UnslothServiceStub, model: Model, gate: StepGate
):
    running = train(stub, model.model_id, inline([fake_row(steps=1, gate=str(gate))]))
    next(running)
    second = train(stub, model.model_id, inline([fake_row(steps=1)]))
    third = train(stub, model.model_id, inline([fake_row(steps=1)]))
    queued = [next(second), next(third)]
    assert [event.state_changed.queue_position for event in queued] == [1, 2]
    gate.open_all()
    ends = [list(each)[-1] for each in (running, second, third)]
    assert [end.WhichOneof("kind") for end in ends] == ["succeeded"] * 3
    times = [end.event_time.ToNanoseconds() for end in ends]
    assert times == sorted(times)


def test_a_queued_training_can_be_cancelled_and_never_runs(stub: UnslothServiceStub, model: Model, gate: StepGate):
    running = train(stub, model.model_id, inline([fake_row(steps=1, gate=str(gate))]))
    next(running)
    waiting = train(stub, model.model_id, inline([fake_row(steps=1)]))
    training_id = next(waiting).training_id
    assert cancel(stub, training_id).state == Training.STATE_CANCELLED
    assert "started" not in kinds(list(watch(stub, training_id)))
    gate.open_all()
    assert kinds(list(running))[-1] == "succeeded"
    waiting.close()


def test_cancel_stops_at_a_step_boundary_keeps_a_checkpoint_and_ends_train_with_aborted(
    stub: UnslothServiceStub, model: Model, gate: StepGate
):
    request = pb.TrainRequest(model_id=model.model_id, train_dataset=inline([fake_row(steps=50, gate=str(gate))]))
    call = stub.Train(request, timeout=CALL_SECONDS)
    gate.open(1, 2)
    training_id = ""
    for response in call:
        training_id = response.event.training_id
        if response.event.step.step == 2:
            break
    cancel(stub, training_id, save_checkpoint=True)
    error = error_of(lambda: call)
    assert (error.code, error.reason, error.metadata["step"]) == ("ABORTED", "TRAINING_CANCELLED", "2")
    training = get(stub, training_id)
    assert training.state == Training.STATE_CANCELLED
    assert [checkpoint.step for checkpoint in training.checkpoints] == [2]
    assert cancel(stub, training_id).state == Training.STATE_CANCELLED


def test_the_same_request_id_attaches_twenty_callers_to_one_run(stub: UnslothServiceStub, model: Model):
    request = pb.TrainRequest(model_id=model.model_id, train_dataset=inline([fake_row(steps=3)]), request_id="one-run")

    def call(_: int) -> list[bytes]:
        return [response.SerializeToString() for response in stub.Train(request, timeout=CALL_SECONDS)]

    with ThreadPoolExecutor(20) as pool:
        logs = list(pool.map(call, range(20)))
    assert all(log == logs[0] for log in logs)
    request.labels["other"] = "content"
    error = error_of(lambda: stub.Train(request, timeout=CALL_SECONDS))
    assert (error.code, error.reason) == ("ALREADY_EXISTS", "REQUEST_ID_REUSED")


def test_a_training_whose_worker_dies_again_and_again_fails_with_the_cause(stub: UnslothServiceStub):
    with prepared_model(stub, "tiny") as model:
        request = pb.TrainRequest(model_id=model.model_id, train_dataset=inline([fake_row(steps=5, die_at_step=3)]))
        error = error_of(lambda: stub.Train(request, timeout=CALL_SECONDS))
        assert (error.code, error.reason, error.metadata["signal"]) == ("ABORTED", "WORKER_DIED", "SIGKILL")
        trainings = stub.ListTrainings(pb.ListTrainingsRequest(model_id=model.model_id)).trainings
        events = list(watch(stub, trainings[0].training_id))
        assert [event.sequence for event in events] == list(range(1, len(events) + 1))
        assert [event.recovery.attempt for event in events if event.HasField("recovery")] == [1, 2, 3]
        assert kinds(events)[-1] == "failed"


def test_out_of_memory_in_the_engine_is_what_train_ends_with(stub: UnslothServiceStub, model: Model):
    rows = inline([fake_row(steps=5, die_at_step=1, die="out_of_memory")])
    error = error_of(lambda: train(stub, model.model_id, rows))
    assert (error.code, error.reason) == ("RESOURCE_EXHAUSTED", "OUT_OF_MEMORY")


def test_an_empty_dataset_fails_the_training_and_leaves_no_folder(
    server: RunningServer, stub: UnslothServiceStub, model: Model
):
    config = TrainingConfig(output_dir="nothing-to-see")
    error = error_of(lambda: train(stub, model.model_id, inline([" "]), training_config=config))
    assert (error.code, error.reason) == ("INVALID_ARGUMENT", "DATASET_EMPTY")
    assert not (server.output_root / "nothing-to-see").exists()


def test_training_before_preparing_says_what_to_call_first(stub: UnslothServiceStub):
    model = load(stub, "tiny")
    error = error_of(lambda: train(stub, model.model_id, inline([{"text": "a"}])))
    assert (error.code, error.reason) == ("FAILED_PRECONDITION", "MODEL_NOT_PREPARED")
    assert "PrepareForTraining" in error.message
    stub.UnloadModel(pb.UnloadModelRequest(model_id=model.model_id), timeout=CALL_SECONDS)


def test_unloading_and_preparing_are_refused_while_a_training_runs(
    stub: UnslothServiceStub, model: Model, gate: StepGate
):
    running = train(stub, model.model_id, inline([fake_row(steps=1, gate=str(gate))]))
    next(running), next(running)
    errors = [
        error_of(lambda: stub.UnloadModel(pb.UnloadModelRequest(model_id=model.model_id), timeout=CALL_SECONDS)),
        error_of(lambda: prepare(stub, model.model_id)),
        error_of(lambda: stub.Generate(pb.GenerateRequest(model_id=model.model_id, prompt="x"))),
    ]
    assert [(error.code, error.reason) for error in errors] == [("FAILED_PRECONDITION", "MODEL_BUSY")] * 3
    gate.open_all()
    assert kinds(list(running))[-1] == "succeeded"


def test_a_forced_unload_cancels_with_a_checkpoint_first(stub: UnslothServiceStub, gate: StepGate):
    model = load(stub, "tiny")
    prepare(stub, model.model_id)
    request = pb.TrainRequest(model_id=model.model_id, train_dataset=inline([fake_row(steps=50, gate=str(gate))]))
    call = stub.Train(request, timeout=CALL_SECONDS)
    training_id = next(call).event.training_id
    gate.open(1)
    for response in call:
        if response.event.step.step == 1:
            break
    stub.UnloadModel(pb.UnloadModelRequest(model_id=model.model_id, force=True), timeout=CALL_SECONDS)
    training = get(stub, training_id)
    assert training.state == Training.STATE_CANCELLED
    assert len(training.checkpoints) == 1
    call.cancel()


def test_every_wrong_field_of_a_train_request_is_told_at_once(stub: UnslothServiceStub, model: Model):
    config = TrainingConfig(
        optim="adamw_9bit", lr_scheduler_type="wavy", max_steps=5, num_train_epochs=1, fp16=True, bf16=True
    )
    error = error_of(lambda: train(stub, model.model_id, inline([{"text": "a"}]), training_config=config))
    assert (error.code, error.reason) == ("INVALID_ARGUMENT", "INVALID_FIELD")
    assert sorted(error.fields) == [
        "training_config",
        "training_config",
        "training_config.lr_scheduler_type",
        "training_config.optim",
    ]
    assert "max_steps or num_train_epochs" in error.message
    assert "fp16 or bf16" in error.message


def test_wrong_paths_of_both_datasets_are_told_at_once(server: RunningServer, stub: UnslothServiceStub, model: Model):
    (server.model_root / "rows.pkl").write_bytes(b"")
    rows = pb.TrainRequest(model_id=model.model_id)
    rows.train_dataset.path = "rows.pkl"
    rows.eval_dataset.path = "rows.pkl"
    error = error_of(lambda: stub.Train(rows, timeout=CALL_SECONDS))
    assert error.fields == ["train_dataset.path", "eval_dataset.path"]


@pytest.mark.parametrize("path", ["../../etc/passwd", "/etc/passwd"])
def test_a_dataset_outside_the_roots_is_refused(path: str, stub: UnslothServiceStub, model: Model):
    request = pb.TrainRequest(model_id=model.model_id)
    request.train_dataset.path = path
    error = error_of(lambda: stub.Train(request, timeout=CALL_SECONDS))
    assert (error.code, error.reason) == ("PERMISSION_DENIED", "PATH_NOT_ALLOWED")


def test_a_watch_of_an_unknown_training_or_beyond_its_log_is_a_typed_error(stub: UnslothServiceStub, model: Model):
    events = list(train(stub, model.model_id, inline([fake_row(steps=1)])))
    unknown = error_of(lambda: watch(stub, "training-of-nobody"))
    beyond = error_of(lambda: watch(stub, events[0].training_id, after_sequence=99))
    assert (unknown.code, unknown.reason) == ("NOT_FOUND", "TRAINING_NOT_FOUND")
    assert (beyond.code, beyond.reason) == ("OUT_OF_RANGE", "SEQUENCE_OUT_OF_RANGE")
    assert beyond.metadata["last_sequence"] == str(len(events))


def test_lists_filter_by_label_and_state_newest_first(stub: UnslothServiceStub, model: Model):
    for name in ("a", "b", "b"):
        list(train(stub, model.model_id, inline([fake_row(steps=1)]), labels={"sweep": name}))
    request = pb.ListTrainingsRequest(labels={"sweep": "b"}, states=[Training.STATE_SUCCEEDED], page_size=1)
    first = stub.ListTrainings(request, timeout=CALL_SECONDS)
    request.page_token = first.next_page_token
    second = stub.ListTrainings(request, timeout=CALL_SECONDS)
    ids = [page.trainings[0].training_id for page in (first, second)]
    assert ids == sorted(ids, reverse=True)
    assert second.next_page_token == ""


def test_two_models_train_at_the_same_time(stub: UnslothServiceStub, model: Model, gate: StepGate):
    with prepared_model(stub, "tiny") as other:
        barrier = threading.Barrier(2, timeout=CALL_SECONDS)
        rows = inline([fake_row(steps=2, gate=str(gate))])

        def run(model_id: str) -> list[str]:
            events = train(stub, model_id, rows)
            begun = [next(events) for _ in range(3)]  # queued, running, started: both are in step 1 now
            barrier.wait()
            gate.open_all()
            return kinds([*begun, *events])

        with ThreadPoolExecutor(2) as pool:
            logs = list(pool.map(run, [model.model_id, other.model_id]))
    assert [log[-1] for log in logs] == ["succeeded", "succeeded"]


def test_a_clients_deadline_ends_its_stream_and_not_the_training(
    stub: UnslothServiceStub, model: Model, gate: StepGate
):
    request = pb.TrainRequest(model_id=model.model_id, train_dataset=inline([fake_row(steps=1, gate=str(gate))]))
    call = stub.Train(request, timeout=1.0)
    training_id = next(call).event.training_id
    with pytest.raises(grpc.RpcError) as caught:
        list(call)
    assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    gate.open_all()
    assert kinds(list(watch(stub, training_id)))[-1] == "succeeded"
