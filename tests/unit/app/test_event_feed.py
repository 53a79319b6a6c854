"""Watchers of an event log: all of it, in order, once, whatever their pace."""

import asyncio
from pathlib import Path

import pytest

from unslothd.v1.error_reason_pb2 import ErrorReason
from unslothd.v1.service_pb2 import WatchTrainingResponse
from unslothd.v1.training_event_pb2 import StepProgress, TrainingEvent, TrainingSucceeded
from unslothd.v1.training_pb2 import Training
from unslothd_server.app import event_feed
from unslothd_server.app.event_feed import EventFeed
from unslothd_server.app.training_state import apply
from unslothd_server.errors import OutOfRangeError, UnavailableError
from unslothd_server.event_log import EventLogWriter

QUIET = 60.0  # seconds of silence before a heartbeat: longer than any test


class Log:
    """A training's log with its feed, written as the server does."""

    def __init__(self, folder: Path) -> None:
        self.training = Training(training_id="training-1", state=Training.STATE_RUNNING)
        self.writer = EventLogWriter(folder / "events.binpb")
        self.feed = EventFeed(self.training, folder / "events.binpb")

    def write(self, event: TrainingEvent) -> None:
        event.sequence = self.training.last_sequence + 1
        self.writer.append(event)
        apply(self.training, event)
        self.feed.publish(event)

    def steps(self, count: int) -> None:
        for _ in range(count):
            self.write(TrainingEvent(step=StepProgress(step=self.training.last_sequence + 1)))

    def succeed(self) -> None:
        self.write(TrainingEvent(succeeded=TrainingSucceeded()))


@pytest.fixture
def log(tmp_path: Path) -> Log:
    return Log(tmp_path)


async def sequences(log: Log, after: int = 0, heartbeat: float = QUIET) -> list[int]:
    async with asyncio.timeout(10):
        return [
            WatchTrainingResponse.FromString(frame).event.sequence async for frame in log.feed.follow(after, heartbeat)
        ]


def test_a_watcher_of_a_finished_training_gets_the_whole_log_and_ends(log: Log):
    log.steps(5)
    log.succeed()
    assert asyncio.run(sequences(log)) == [1, 2, 3, 4, 5, 6]


def test_after_sequence_skips_what_the_watcher_has(log: Log):
    log.steps(5)
    log.succeed()
    assert asyncio.run(sequences(log, after=4)) == [5, 6]
    assert asyncio.run(sequences(log, after=6)) == []


def test_watchers_that_come_at_different_times_all_see_every_event(log: Log):
    async def scenario() -> list[list[int]]:
        early = asyncio.create_task(sequences(log))
        await asyncio.sleep(0)
        log.steps(3)
        late = asyncio.create_task(sequences(log))
        await asyncio.sleep(0)
        log.steps(3)
        log.succeed()
        return [await early, await late]

    assert asyncio.run(scenario()) == [[1, 2, 3, 4, 5, 6, 7]] * 2


def test_a_watcher_behind_what_memory_keeps_reads_the_file(log: Log, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(event_feed, "_FRAMES_IN_MEMORY", 8)
    (tmp_path / "small").mkdir()
    small = Log(tmp_path / "small")
    small.steps(50)
    watching = asyncio.Event()

    async def scenario() -> list[int]:
        seen: list[int] = []
        async with asyncio.timeout(10):
            async for frame in small.feed.follow(0, QUIET):
                seen.append(WatchTrainingResponse.FromString(frame).event.sequence)
                if len(seen) == 50 and not watching.is_set():
                    watching.set()
                    small.steps(3)
                    small.succeed()
        return seen

    assert asyncio.run(scenario()) == list(range(1, 55))


def test_a_silent_training_sends_heartbeats_that_take_no_sequence(log: Log):
    async def first_frame() -> TrainingEvent:
        async with asyncio.timeout(10):
            async for frame in log.feed.follow(0, 0.001):
                return WatchTrainingResponse.FromString(frame).event
        raise AssertionError("the feed ended")

    event = asyncio.run(first_frame())
    assert (event.sequence, event.heartbeat.state) == (0, Training.STATE_RUNNING)


def test_a_sequence_beyond_the_log_is_out_of_range_and_says_where_it_ends(log: Log):
    log.steps(2)
    with pytest.raises(OutOfRangeError) as caught:
        asyncio.run(sequences(log, after=3))
    assert caught.value.metadata == {"last_sequence": "2"}


def test_an_interrupted_watcher_gets_all_there_is_and_then_the_error(log: Log):
    seen: list[int] = []

    async def watch() -> None:
        async with asyncio.timeout(10):
            async for frame in log.feed.follow(0, QUIET):
                seen.append(WatchTrainingResponse.FromString(frame).event.sequence)

    async def scenario() -> None:
        log.steps(2)
        log.feed.interrupt(UnavailableError(ErrorReason.ERROR_REASON_SERVER_STOPPING, "stopping"))
        await watch()

    with pytest.raises(UnavailableError):
        asyncio.run(scenario())
    assert seen == [1, 2]


async def responses(log: Log, max_events: int, after: int = 0) -> list[WatchTrainingResponse]:
    async with asyncio.timeout(10):
        return [WatchTrainingResponse.FromString(each) async for each in log.feed.follow(after, QUIET, max_events)]


def test_several_events_come_in_one_response_where_that_was_asked_for(log: Log):
    log.steps(7)
    log.succeed()
    found = asyncio.run(responses(log, 3, after=1))
    assert [[event.sequence for event in each.events] for each in found] == [[2, 3, 4], [5, 6, 7], [8]]
    assert not any(each.HasField("event") for each in found)


def test_a_watcher_that_keeps_up_gets_each_event_as_it_happens_and_is_told_where_a_stop_left_it(log: Log):
    async def scenario() -> list[list[int]]:
        found: list[list[int]] = []
        async with asyncio.timeout(10):
            async for each in log.feed.follow(0, QUIET, 100):
                found.append([event.sequence for event in WatchTrainingResponse.FromString(each).events])
                if len(found) < 3:
                    log.steps(1)
                else:
                    log.feed.interrupt(UnavailableError(ErrorReason.ERROR_REASON_SERVER_STOPPING, "It stops."))
        return found

    log.steps(2)
    with pytest.raises(UnavailableError) as caught:
        asyncio.run(scenario())
    assert caught.value.metadata["last_sequence"] == "4"


def test_a_response_of_several_events_stays_small(log: Log, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(event_feed, "_MOST_RESPONSE_BYTES", 30)
    log.steps(6)
    log.succeed()
    found = asyncio.run(responses(log, 100))
    assert [event.sequence for each in found for event in each.events] == list(range(1, 8))
    assert len(found) > 1
    assert all(each.ByteSize() <= 30 or len(each.events) == 1 for each in found)
