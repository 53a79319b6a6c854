"""One training in a worker: numbers without a gap, a terminal event whatever happens, and watchers that see it all."""

import logging
import os
from collections.abc import Callable
from pathlib import Path
from threading import Thread

import pytest

from unslothd.v1.error_reason_pb2 import ErrorReason
from unslothd.v1.training_event_pb2 import StepProgress, TrainingCancelled, TrainingEvent, TrainingSucceeded
from unslothd.v1.training_pb2 import Checkpoint, Training
from unslothd.worker.v1.worker_service_pb2 import StartTrainingRequest
from unslothd_server.errors import ExhaustedError, OutOfRangeError
from unslothd_server.event_log import EventLogReader, EventLogWriter
from unslothd_server.worker.faults import DeviceLostError
from unslothd_server.worker.ports import StopSignal
from unslothd_server.worker.training_run import TrainingRun

Emit = Callable[[TrainingEvent], None]


class Engine:
    def __init__(self, train: Callable[[Emit, StopSignal], TrainingSucceeded | TrainingCancelled]) -> None:
        self._train = train

    def train(self, request: StartTrainingRequest, emit: Emit, stop: StopSignal):
        return self._train(emit, stop)


def three_steps(emit: Emit, stop: StopSignal) -> TrainingSucceeded:
    for step in (1, 2, 3):
        emit(TrainingEvent(step=StepProgress(step=step)))
    return TrainingSucceeded(output_dir="/out/final")


def make_run(folder: Path, next_sequence: int = 1) -> TrainingRun:
    return TrainingRun(StartTrainingRequest(training_id="t", training_dir=str(folder), next_sequence=next_sequence))


def kinds(folder: Path) -> list[str | None]:
    return [entry.event.WhichOneof("kind") for entry in EventLogReader(folder / "events.binpb").read()]


def last(folder: Path) -> TrainingEvent:
    return list(EventLogReader(folder / "events.binpb").read())[-1].event


def test_events_get_number_training_and_time_between_running_and_the_end(tmp_path: Path):
    run = make_run(tmp_path)

    run.execute(Engine(three_steps))

    events = [entry.event for entry in EventLogReader(tmp_path / "events.binpb").read()]
    assert [event.sequence for event in events] == [1, 2, 3, 4, 5]
    assert {event.training_id for event in events} == {"t"}
    assert all(event.event_time.seconds > 0 for event in events)
    assert events[0].state_changed.state == Training.STATE_RUNNING
    assert events[-1].succeeded.output_dir == "/out/final"
    assert run.is_over


def test_the_log_goes_on_where_the_server_left_it(tmp_path: Path):
    writer = EventLogWriter(tmp_path / "events.binpb")
    for sequence in (1, 2):
        writer.append(TrainingEvent(sequence=sequence))

    make_run(tmp_path, next_sequence=3).execute(Engine(three_steps))

    assert last(tmp_path).sequence == 7


def test_a_hand_over_that_does_not_match_the_log_is_refused(tmp_path: Path):
    with pytest.raises(OutOfRangeError) as caught:
        make_run(tmp_path, next_sequence=3)

    assert caught.value.metadata == {"last_sequence": "0"}
    assert "next_sequence must be 1, not 3" in caught.value.message


def test_a_typed_error_becomes_the_failed_event(tmp_path: Path):
    def fails(emit: Emit, stop: StopSignal) -> TrainingSucceeded:
        raise ExhaustedError(ErrorReason.ERROR_REASON_OUT_OF_MEMORY, "Take a smaller batch_size.")

    make_run(tmp_path).execute(Engine(fails))

    assert last(tmp_path).failed.error.message == "Take a smaller batch_size."


@pytest.mark.parametrize("bug", [RuntimeError("inside"), SystemExit(3), KeyError("inside")])
def test_a_bug_becomes_internal_with_an_id_that_the_log_explains(
    tmp_path: Path, bug: BaseException, caplog: pytest.LogCaptureFixture
):
    def fails(emit: Emit, stop: StopSignal) -> TrainingSucceeded:
        raise bug

    with caplog.at_level(logging.ERROR):
        make_run(tmp_path).execute(Engine(fails))

    error = last(tmp_path).failed.error
    assert error.code == 13
    assert "inside" not in str(error)
    (record,) = caplog.records
    assert record.args is not None
    assert record.args[0] in error.message
    assert record.exc_info is not None


def test_a_stop_before_the_start_cancels_without_touching_the_engine(tmp_path: Path):
    run = make_run(tmp_path)
    run.cancel(save_checkpoint=False)

    run.execute(Engine(lambda emit, stop: pytest.fail("the engine was called")))

    assert kinds(tmp_path) == ["cancelled"]


def test_a_checkpoint_that_anyone_asked_for_is_saved(tmp_path: Path):
    run = make_run(tmp_path)
    run.cancel(save_checkpoint=True)
    run.cancel(save_checkpoint=False)

    assert run.stop.requested.is_set()
    assert run.stop.save_checkpoint


def test_checkpoints_and_ends_are_forced_to_the_disk_and_steps_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = make_run(tmp_path)
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda _file: synced.append(run.last_sequence + 1))

    def train(emit: Emit, stop: StopSignal) -> TrainingSucceeded:
        emit(TrainingEvent(step=StepProgress(step=1)))
        emit(TrainingEvent(checkpoint_saved=Checkpoint(step=1)))
        return TrainingSucceeded()

    run.execute(Engine(train))

    assert synced == [3, 4]


def test_watchers_see_every_event_whenever_they_come(tmp_path: Path):
    run = make_run(tmp_path)
    seen: list[list[int]] = [[] for _ in range(5)]

    def watch(mine: list[int]) -> None:
        mine.extend(event.sequence for event in run.follow(0, lambda: True))

    watchers = [Thread(target=watch, args=(mine,)) for mine in seen]
    for watcher in watchers[:3]:
        watcher.start()
    run.execute(Engine(three_steps))
    for watcher in watchers[3:]:
        watcher.start()
    for watcher in watchers:
        watcher.join(10)

    assert seen == [[1, 2, 3, 4, 5]] * 5
    assert [event.sequence for event in run.follow(3, lambda: True)] == [4, 5]
    assert list(run.follow(5, lambda: True)) == []


def test_a_watch_beyond_the_end_is_out_of_range(tmp_path: Path):
    run = make_run(tmp_path)
    run.execute(Engine(three_steps))

    with pytest.raises(OutOfRangeError) as caught:
        list(run.follow(6, lambda: True))

    assert caught.value.metadata == {"last_sequence": "5"}


def test_a_watch_whose_caller_is_gone_ends(tmp_path: Path):
    assert list(make_run(tmp_path).follow(0, lambda: False)) == []


def test_when_the_end_cannot_be_written_watchers_get_the_reason_after_the_events(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run = make_run(tmp_path)

    def disk_fills_up(emit: Emit, stop: StopSignal) -> TrainingSucceeded:
        emit(TrainingEvent(step=StepProgress(step=1)))
        monkeypatch.setattr(os, "write", _no_space)
        return TrainingSucceeded()

    run.execute(Engine(disk_fills_up))
    monkeypatch.undo()
    watch = run.follow(0, lambda: True)

    assert [next(watch).sequence, next(watch).sequence] == [1, 2]
    with pytest.raises(ExhaustedError, match="is full"):
        next(watch)


def _no_space(_file: int, _data: object) -> int:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("text", ["CUDA error: device-side assert triggered", "CUDA error: uncorrectable ECC error"])
def test_a_broken_gpu_context_ends_the_worker_and_leaves_the_training_open(tmp_path: Path, text: str):
    def broken(emit: Emit, stop: StopSignal) -> TrainingSucceeded:
        emit(TrainingEvent(step=StepProgress(step=1)))
        raise RuntimeError(f"{text}\nCompile with TORCH_USE_CUDA_DSA")

    with pytest.raises(DeviceLostError, match=f"context is lost: {text}$"):
        make_run(tmp_path).execute(Engine(broken))

    assert kinds(tmp_path) == ["state_changed", "step"]


def test_a_full_gpu_ends_the_training_and_not_the_worker(tmp_path: Path):
    def full(emit: Emit, stop: StopSignal) -> TrainingSucceeded:
        raise RuntimeError("CUDA error: out of memory")

    make_run(tmp_path).execute(Engine(full))

    assert kinds(tmp_path)[-1] == "failed"
