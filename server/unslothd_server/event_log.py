"""The event log of a training: one file of length-prefixed TrainingEvents, appended by one writer, read by any number.

The file is the truth about a training. Whatever happened to the machine, what a reader takes from it is a prefix of
what was appended: it stops at the first record that is torn, empty or out of sequence, and the next writer cuts the
file there. A record is the event's size as a varint and the event, which is also what follows the tag of a field:
`LogEntry.frame` puts that one byte before the stored bytes and has a message to send, with nothing encoded again.
"""

import io
import os
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from google.protobuf.message import DecodeError
from google.protobuf.proto import serialize_length_prefixed

from unslothd.v1.training_event_pb2 import TrainingEvent
from unslothd_server import disk

EVENT_LOG_NAME = "events.binpb"
TERMINAL_KINDS = frozenset({"succeeded", "failed", "cancelled"})

_EVENT_FIELD_TAG = b"\x0a"  # field 1, length-delimited: `event` of TrainResponse and of both WatchTrainingResponses
_CHUNK_BYTES = 1 << 18
_MAX_RECORD_BYTES = 64 << 20  # a longer size can only come from a damaged file
_MAX_SIZE_BYTES = 5  # bytes of the varint of a size up to _MAX_RECORD_BYTES, and one to spare
_MARK_EVERY = 256  # events between two offsets that a reader remembers
_AFTER_A_FULL_DISK = "go on with ResumeTraining, or start anew with Train if no checkpoint was saved yet"


def is_terminal(event: TrainingEvent) -> bool:
    """Tells whether an event is the last of its log."""
    return event.WhichOneof("kind") in TERMINAL_KINDS


class LogEntry(NamedTuple):
    """One event of a log.

    Args:
        event: The event.
        frame: An encoded message whose field 1 is the event: a TrainResponse or a WatchTrainingResponse as it goes
            over the wire.
    """

    event: TrainingEvent
    frame: bytes


class EventLogReader:
    """Reads a log that may be growing. Remembers where events are, so that reading on is cheap. For one thread.

    Args:
        path: The file. One that does not exist is an empty log.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._marks: list[tuple[int, int]] = [(0, 0)]  # (sequence, offset of the byte after that event)
        self._end = (0, 0)

    @property
    def last_sequence(self) -> int:
        """Highest sequence that was read so far."""
        return self._end[0]

    @property
    def end_offset(self) -> int:
        """Bytes of the file up to and with the event `last_sequence`."""
        return self._end[1]

    def read(self, after_sequence: int = 0) -> Iterator[LogEntry]:
        """Yields the events after a sequence that are whole in the file now."""
        sequence, offset = self._nearest(after_sequence)
        try:
            file = self._path.open("rb", buffering=0)
        except FileNotFoundError:
            return
        with file:
            buffer, position = b"", 0
            while True:
                span = _record_span(buffer, position)
                if span is None or span[1] > len(buffer):
                    # Read again from the record's start, never only what is missing: a writer may have cut this tail
                    # and written over it since.
                    file.seek(offset + position)
                    fresh = file.read(_CHUNK_BYTES if span is None else max(_CHUNK_BYTES, span[1] - position))
                    if len(fresh) <= len(buffer) - position:
                        return
                    offset, buffer, position = offset + position, fresh, 0
                    continue
                event = _parse(buffer[span[0] : span[1]])
                if event is None or event.sequence != sequence + 1:
                    return
                record_start, position = position, span[1]
                sequence += 1
                self._remember(sequence, offset + position)
                if sequence > after_sequence:
                    yield LogEntry(event, _EVENT_FIELD_TAG + buffer[record_start:position])

    def _nearest(self, sequence: int) -> tuple[int, int]:
        if sequence >= self._end[0]:
            return self._end
        return self._marks[bisect_right(self._marks, sequence, key=lambda mark: mark[0]) - 1]

    def _remember(self, sequence: int, offset: int) -> None:
        if sequence <= self._end[0]:
            return
        self._end = (sequence, offset)
        if sequence % _MARK_EVERY == 0:
            self._marks.append(self._end)


class EventLogWriter:
    """Appends to a log. There is one writer at a time; opening one cuts a torn tail off.

    Args:
        path: The file; made when it does not exist, in a folder that does.

    Raises:
        UnslothdError: The file cannot be made or written to (DISK_FULL, NOT_WRITABLE).
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        reader = EventLogReader(path)
        last: TrainingEvent | None = None
        for entry in reader.read():
            last = entry.event
        self._last = last
        self._sequence = reader.last_sequence
        self._offset = reader.end_offset
        is_new = not path.exists()
        with disk.telling(path.parent, _AFTER_A_FULL_DISK):
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self.cut_bytes = os.fstat(self._file).st_size - self._offset
        if self.cut_bytes:
            os.ftruncate(self._file, self._offset)
        os.lseek(self._file, self._offset, os.SEEK_SET)
        if is_new:
            disk.sync_folder(path.parent)

    @property
    def last_sequence(self) -> int:
        """Sequence of the last event; 0 in an empty log."""
        return self._sequence

    @property
    def last_event(self) -> TrainingEvent | None:
        """The last event; None in an empty log."""
        return self._last

    def append(self, event: TrainingEvent, *, fsync: bool = False) -> None:
        """Appends one event and hands it to the operating system; with fsync, to the disk.

        Raises:
            ValueError: Its sequence is not the last one + 1.
            UnslothdError: The disk takes no more (DISK_FULL, NOT_WRITABLE). The log is as it was.
        """
        if event.sequence != self._sequence + 1:
            raise ValueError(f"event {event.sequence} cannot follow event {self._sequence} in {self._path}")
        record = io.BytesIO()
        serialize_length_prefixed(event, record)
        try:
            _write_all(self._file, record.getvalue())
            if fsync:
                os.fsync(self._file)
        except OSError as error:
            self._cut_back()
            known = disk.unwritable(error, self._path.parent, _AFTER_A_FULL_DISK)
            raise (error if known is None else known) from error
        self._offset += record.tell()
        self._sequence = event.sequence
        self._last = event

    def close(self) -> None:
        """Closes the file. Repeatable."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _cut_back(self) -> None:
        with suppress(OSError):  # what is left there is torn: readers stop before it, the next event goes over it
            os.ftruncate(self._file, self._offset)
        os.lseek(self._file, self._offset, os.SEEK_SET)


def _record_span(buffer: bytes, position: int) -> tuple[int, int] | None:
    """Returns where the event of the record at `position` begins and ends; None when its size is not (yet) legal."""
    size = shift = 0
    for index in range(position, min(position + _MAX_SIZE_BYTES, len(buffer))):
        byte = buffer[index]
        size |= (byte & 0x7F) << shift
        if byte < 0x80:  # noqa: PLR2004 - a varint's last byte has no continuation bit
            return (index + 1, index + 1 + size) if 0 < size <= _MAX_RECORD_BYTES else None
        shift += 7
    return None


def _parse(payload: bytes) -> TrainingEvent | None:
    try:
        return TrainingEvent.FromString(payload)
    except DecodeError:
        return None


def _write_all(file: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(file, view) :]
