"""The events of one training for any number of watchers: recent ones from memory, older ones from the log file."""

from collections import deque
from collections.abc import AsyncIterator, Iterator
from itertools import islice
from pathlib import Path

from unslothd.v1.error_reason_pb2 import ErrorReason
from unslothd.v1.service_pb2 import WatchTrainingResponse
from unslothd.v1.training_event_pb2 import Heartbeat, TrainingEvent
from unslothd.v1.training_pb2 import Training
from unslothd_server.app.broadcast import WakeUp
from unslothd_server.app.training_state import is_final, now
from unslothd_server.errors import OutOfRangeError, UnavailableError
from unslothd_server.event_log import EventLogReader

# Frames kept in memory for a training that runs; a watcher that is further behind reads the file.
_FRAMES_IN_MEMORY = 4096
# Frames handed to a watcher at a time, so that one far behind does not hold up the others.
_FRAMES_A_READ = 256
# A response of several events is not larger than this, unless one event is.
_MOST_RESPONSE_BYTES = 256 * 1024
# First byte of an element of WatchTrainingResponse.events; a frame has that of `event` there.
_EVENTS_TAG = b"\x12"


class EventFeed:
    """Fan-out of one event log. A watcher is a position in it and nothing else, so none can hold up another.

    Args:
        training: Its `last_sequence` and `state` say where the log is; kept up to date by the owner.
        log: The event log.

    Attributes:
        watchers: How many follow it now.
    """

    def __init__(self, training: Training, log: Path) -> None:
        self._training = training
        self._reader = EventLogReader(log)
        self._recent: deque[bytes] = deque(maxlen=_FRAMES_IN_MEMORY)
        self._changed = WakeUp()
        self._interruption: UnavailableError | None = None
        self.watchers = 0

    def publish(self, event: TrainingEvent, *, in_log: bool = True) -> None:
        """Shows watchers the next event; it is applied to the training already, and in the log if the disk took it."""
        self._recent.append(WatchTrainingResponse(event=event).SerializeToString())
        if in_log and is_final(self._training):
            self._recent.clear()  # what is over is read from the file
        self._changed.notify()

    def interrupt(self, error: UnavailableError) -> None:
        """Ends every watch with an error, e.g. because the server is stopping; it tells where to go on."""
        self._interruption = error
        self._changed.notify()

    async def follow(self, after_sequence: int, heartbeat_seconds: float, max_events: int = 1) -> AsyncIterator[bytes]:
        """Yields encoded WatchTrainingResponses (TrainResponse has the same encoding for one event), then ends.

        Args:
            after_sequence: Last sequence that the watcher has.
            heartbeat_seconds: Silence after which a heartbeat is sent.
            max_events: Most events of a response.

        Raises:
            OutOfRangeError: after_sequence is beyond the log.
        """
        last = self._training.last_sequence
        if after_sequence > last:
            raise OutOfRangeError(
                ErrorReason.ERROR_REASON_SEQUENCE_OUT_OF_RANGE,
                f"after_sequence {after_sequence} is beyond the log, which ends at {last}; watch from there or before.",
                metadata={"last_sequence": str(last)},
            )
        self.watchers += 1
        try:
            async for frames in self._from(after_sequence, heartbeat_seconds):
                for response in frames if max_events <= 1 else _joined(frames, max_events):
                    yield response
        finally:
            self.watchers -= 1

    async def _from(self, position: int, heartbeat_seconds: float) -> AsyncIterator[list[bytes]]:
        while True:
            frames = self._read(position)
            if frames:
                yield frames
                position += len(frames)
                continue
            if is_final(self._training):
                return
            if self._interruption is not None:
                raise _at(position, self._interruption)
            if not await self._changed.wait(heartbeat_seconds):
                yield [self._heartbeat()]

    def _read(self, position: int) -> list[bytes]:
        """Frames after a position; empty when the watcher has all."""
        behind = self._training.last_sequence - position
        if behind <= 0:
            return []
        if behind <= len(self._recent):
            start = len(self._recent) - behind
            return [self._recent[index] for index in range(start, min(start + _FRAMES_A_READ, len(self._recent)))]
        return [entry.frame for entry in islice(self._reader.read(position), _FRAMES_A_READ)]

    def _heartbeat(self) -> bytes:
        event = TrainingEvent(
            training_id=self._training.training_id, event_time=now(), heartbeat=Heartbeat(state=self._training.state)
        )
        return WatchTrainingResponse(event=event).SerializeToString()


def _joined(frames: list[bytes], max_events: int) -> Iterator[bytes]:
    """Puts frames together, as many as a response may have."""
    parts: list[bytes] = []
    size = 0
    for frame in frames:
        if parts and (len(parts) == max_events or size + len(frame) > _MOST_RESPONSE_BYTES):
            yield b"".join(parts)
            parts, size = [], 0
        parts.append(_EVENTS_TAG + frame[1:])
        size += len(frame)
    yield b"".join(parts)


def _at(position: int, error: UnavailableError) -> UnavailableError:
    return UnavailableError(
        error.reason, error.message, metadata={"last_sequence": str(position)}, retry_seconds=error.retry_seconds
    )
