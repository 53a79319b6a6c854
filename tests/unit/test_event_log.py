"""The event log: whatever is cut from the file, a reader gets a valid prefix, and a writer goes on behind it."""

import errno
import io
import os
from pathlib import Path

import pytest
from google.protobuf.proto import serialize_length_prefixed
from hypothesis import given, settings
from hypothesis import strategies as st

from unslothd.v1.error_reason_pb2 import ErrorReason
from unslothd.v1.service_pb2 import TrainResponse, WatchTrainingResponse
from unslothd.v1.training_event_pb2 import StepProgress, TrainingEvent, TrainingSucceeded, TrainingWarning
from unslothd.worker.v1 import worker_service_pb2 as worker
from unslothd_server.errors import ExhaustedError
from unslothd_server.event_log import EventLogReader, EventLogWriter, is_terminal


def event(sequence: int, message: str = "") -> TrainingEvent:
    return TrainingEvent(sequence=sequence, training_id="t", warning=TrainingWarning(reason="R", message=message))


def write(path: Path, messages: list[str]) -> list[TrainingEvent]:
    events = [event(number, message) for number, message in enumerate(messages, start=1)]
    writer = EventLogWriter(path)
    for each in events:
        writer.append(each)
    writer.close()
    return events


def record(event: TrainingEvent) -> bytes:
    stream = io.BytesIO()
    serialize_length_prefixed(event, stream)
    return stream.getvalue()


def read(path: Path, after_sequence: int = 0) -> list[TrainingEvent]:
    return [entry.event for entry in EventLogReader(path).read(after_sequence)]


texts = st.lists(st.text(max_size=300), min_size=1, max_size=12)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("logs")


@settings(max_examples=200, deadline=None)
@given(messages=texts, data=st.data())
def test_a_file_cut_at_any_byte_gives_every_event_that_is_whole(folder: Path, messages: list[str], data: st.DataObject):
    path = folder / "cut.binpb"
    path.unlink(missing_ok=True)
    ends = [0]
    writer = EventLogWriter(path)
    for number, message in enumerate(messages, start=1):
        writer.append(event(number, message))
        ends.append(path.stat().st_size)
    writer.close()
    size = data.draw(st.integers(0, ends[-1]))
    os.truncate(path, size)

    whole = sum(1 for end in ends[1:] if end <= size)
    assert read(path) == [event(number, messages[number - 1]) for number in range(1, whole + 1)]

    reopened = EventLogWriter(path)
    assert reopened.last_sequence == whole
    assert reopened.cut_bytes == size - ends[whole]
    reopened.append(event(whole + 1, "after the cut"))
    reopened.close()
    assert [each.sequence for each in read(path)] == list(range(1, whole + 2))


@settings(max_examples=100, deadline=None)
@given(messages=texts, tail=st.binary(min_size=1, max_size=200))
def test_garbage_behind_the_last_event_never_hides_or_changes_an_event(folder: Path, messages: list[str], tail: bytes):
    path = folder / "garbage.binpb"
    path.unlink(missing_ok=True)
    events = write(path, messages)
    with path.open("ab") as file:
        file.write(tail)

    found = read(path)

    assert found[: len(events)] == events
    assert [each.sequence for each in found] == list(range(1, len(found) + 1))


@settings(max_examples=200, deadline=None)
@given(
    deeds=st.lists(
        st.one_of(
            st.tuples(st.just("append"), st.text(max_size=300)),
            st.tuples(st.just("crash inside an append"), st.integers(0, 400)),
            st.tuples(st.just("crash that leaves zeros"), st.integers(1, 5000)),
            st.tuples(st.just("read on"), st.integers(0, 2)),
            st.tuples(st.just("read from the begin"), st.just(0)),
        ),
        max_size=40,
    )
)
def test_appends_crashes_and_reads_in_any_order_show_every_whole_event_once(
    folder: Path, deeds: list[tuple[str, str | int]]
):
    path = folder / "interleaved.binpb"
    path.unlink(missing_ok=True)
    written: list[TrainingEvent] = []
    readers = [(EventLogReader(path), list[TrainingEvent]()) for _ in range(3)]
    writer: EventLogWriter | None = None
    for what, value in deeds:
        following = event(len(written) + 1, value if isinstance(value, str) else "x" * value)
        if not what.startswith("read"):
            writer = writer or EventLogWriter(path)
        if what == "append" and writer is not None:
            writer.append(following)
            written.append(following)
        elif what.startswith("crash"):
            tail = (
                bytes(int(value))
                if "zeros" in what
                else record(following)[: min(int(value), len(record(following)) - 1)]
            )
            with path.open("ab") as file:
                file.write(tail)
            writer = None
        elif what == "read on":
            reader, seen = readers[int(value)]
            seen += [entry.event for entry in reader.read(len(seen))]
            assert seen == written
        else:
            assert read(path) == written
    assert [entry.event for entry in readers[0][0].read()] == written


def test_a_zero_filled_tail_is_not_taken_for_events(tmp_path: Path):
    path = tmp_path / "log"
    events = write(path, ["a", "b"])
    with path.open("ab") as file:
        file.write(bytes(4096))

    assert read(path) == events
    assert EventLogWriter(path).cut_bytes == 4096


def test_a_record_whose_payload_was_never_written_is_not_taken(tmp_path: Path):
    path = tmp_path / "log"
    write(path, ["a", "b" * 200])
    size = path.stat().st_size
    payload_size = event(2, "b" * 200).ByteSize()
    os.truncate(path, size - payload_size)
    os.truncate(path, size)

    assert [each.sequence for each in read(path)] == [1]


def test_reading_stops_where_the_sequence_does_not_go_on(tmp_path: Path):
    first, second = tmp_path / "first", tmp_path / "second"
    write(first, ["a", "b"])
    write(second, ["a", "b", "c"])
    with first.open("ab") as file:
        file.write(second.read_bytes())

    assert [each.sequence for each in read(first)] == [1, 2]


@pytest.mark.parametrize("sequence", [0, 1, 2, 4])
def test_an_event_that_does_not_follow_the_last_one_is_refused(tmp_path: Path, sequence: int):
    path = tmp_path / "log"
    write(path, ["a", "b"])

    with pytest.raises(ValueError, match="cannot follow event 2"):
        EventLogWriter(path).append(event(sequence))

    assert len(read(path)) == 2


def test_a_reader_follows_a_growing_file(tmp_path: Path):
    path = tmp_path / "log"
    reader = EventLogReader(path)
    assert list(reader.read()) == []
    writer = EventLogWriter(path)
    for sequence in range(1, 1001):
        writer.append(event(sequence))
        assert [entry.event.sequence for entry in reader.read(sequence - 1)] == [sequence]


def test_reading_from_any_sequence_gives_all_events_after_it(tmp_path: Path):
    path = tmp_path / "log"
    write(path, [str(number) for number in range(1500)])
    reader = EventLogReader(path)
    list(reader.read())

    for after in [0, 1, 255, 256, 257, 511, 512, 1499, 1500, 2000]:
        expected = list(range(after + 1, 1501))
        assert [entry.event.sequence for entry in reader.read(after)] == expected
        assert [each.sequence for each in read(path, after)] == expected


def test_a_reader_that_saw_a_torn_tail_reads_what_was_written_over_it(tmp_path: Path):
    path = tmp_path / "log"
    write(path, ["a", "b", "x" * 1000])
    os.truncate(path, path.stat().st_size - 10)
    iterator = EventLogReader(path).read()
    assert [next(iterator).event.sequence, next(iterator).event.sequence] == [1, 2]

    writer = EventLogWriter(path)
    writer.append(event(3, "y" * 2000))
    writer.append(event(4, "z"))

    assert [(entry.event.sequence, entry.event.warning.message[:1]) for entry in iterator] == [(3, "y"), (4, "z")]


def test_an_event_larger_than_the_read_buffer_is_read_whole(tmp_path: Path):
    path = tmp_path / "log"
    events = write(path, ["a", "b" * 3_000_000, "c"])

    assert read(path) == events


@pytest.mark.parametrize("message", [TrainResponse, WatchTrainingResponse, worker.WatchTrainingResponse])
def test_a_frame_is_the_encoded_response_of_every_stream_of_events(tmp_path: Path, message: type):
    path = tmp_path / "log"
    write(path, ["a", "b" * 500])

    for entry in EventLogReader(path).read():
        assert message.FromString(entry.frame) == message(event=entry.event)
        assert entry.frame == message(event=entry.event).SerializeToString()


def test_a_full_disk_is_a_typed_error_and_leaves_the_log_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "log"
    write(path, ["a"])
    before = path.read_bytes()
    writer = EventLogWriter(path)
    real_write = os.write

    def half_then_full(file: int, data: memoryview) -> int:
        if path.stat().st_size == len(before):
            return real_write(file, data[: len(data) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", half_then_full)
    with pytest.raises(ExhaustedError) as caught:
        writer.append(event(2, "b"))
    monkeypatch.undo()

    assert caught.value.reason == ErrorReason.ERROR_REASON_DISK_FULL
    assert path.read_bytes() == before
    writer.append(event(2, "c"))
    assert [each.warning.message for each in read(path)] == ["a", "c"]


def test_the_writer_knows_the_last_event_of_an_earlier_one(tmp_path: Path):
    path = tmp_path / "log"
    events = write(path, ["a", "b"])

    writer = EventLogWriter(path)

    assert (writer.last_sequence, writer.last_event) == (2, events[-1])


def test_only_the_owner_may_read_a_log(tmp_path: Path):
    write(tmp_path / "log", ["a"])

    assert (tmp_path / "log").stat().st_mode & 0o777 == 0o600


def test_the_last_kinds_are_terminal_and_others_are_not():
    assert is_terminal(TrainingEvent(succeeded=TrainingSucceeded()))
    assert not is_terminal(TrainingEvent(step=StepProgress()))
    assert not is_terminal(TrainingEvent())
