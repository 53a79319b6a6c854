"""One training in a worker: the engine's events get their numbers, go into the log, and from there to the watchers."""

import logging
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from threading import Condition, Event

from unslothd.v1.error_reason_pb2 import ErrorReason
from unslothd.v1.training_event_pb2 import (
    TrainingCancelled,
    TrainingEvent,
    TrainingFailed,
    TrainingStateChanged,
    TrainingSucceeded,
)
from unslothd.v1.training_pb2 import Training
from unslothd.worker.v1.worker_service_pb2 import StartTrainingRequest
from unslothd_server.errors import OutOfRangeError, UnslothdError
from unslothd_server.event_log import EVENT_LOG_NAME, EventLogReader, EventLogWriter
from unslothd_server.status import to_status
from unslothd_server.worker.faults import as_unslothd_error, end_if_device_is_lost
from unslothd_server.worker.ports import Engine, StopSignal, TrainingPaused

_log = logging.getLogger(__name__)
_CALLER_CHECK_S = 1.0  # how soon a watch without events notices that its caller has gone


class TrainingRun:
    """A training that was handed over to this worker.

    Args:
        request: What to train. Its log must end at next_sequence - 1.

    Raises:
        OutOfRangeError: The log ends elsewhere (SEQUENCE_OUT_OF_RANGE).
    """

    def __init__(self, request: StartTrainingRequest) -> None:
        self.request = request
        self.stop = StopSignal(Event())
        self._path = Path(request.training_dir) / EVENT_LOG_NAME
        self._changed = Condition()
        self._over = False
        self._last_sequence = request.next_sequence - 1
        self._log_error: UnslothdError | None = None
        self._writer = EventLogWriter(self._path)
        if self._writer.cut_bytes:
            _log.warning("%s: cut a torn tail of %d bytes", self._path, self._writer.cut_bytes)
        if self._writer.last_sequence + 1 != request.next_sequence:
            self._writer.close()
            raise _not_next(request, self._writer.last_sequence)

    @property
    def is_over(self) -> bool:
        """True once the last event is in the log (a terminal one, or PAUSED), or cannot be written."""
        return self._over

    @property
    def last_sequence(self) -> int:
        """Last sequence in the log."""
        return self._last_sequence

    def execute(self, engine: Engine) -> None:
        """Runs the training to its last event. For the main thread.

        Raises:
            DeviceLostError: The process has to end; the training goes on in another one.
        """
        self.stop.beat()  # it may have waited for the main thread
        try:
            last = self._outcome(engine)
        except (Exception, SystemExit) as error:  # noqa: BLE001 - the boundary: the error becomes the last event
            end_if_device_is_lost(error)
            failure = as_unslothd_error(error, f"training {self.request.training_id}")
            last = TrainingEvent(failed=TrainingFailed(error=to_status(failure)))
        with self._changed:  # whoever sees the last event finds the worker ready for the next training
            try:
                self._append(last, fsync=True)
            except Exception as error:  # noqa: BLE001 - the watchers get it
                self._log_error = as_unslothd_error(error, f"ending the log of training {self.request.training_id}")
            self._writer.close()
            self._over = True
            self._changed.notify_all()

    @property
    def seconds_since_progress(self) -> float:
        """Seconds since it last did anything."""
        return self.stop.seconds_since_beat()

    def cancel(self, *, save_checkpoint: bool) -> None:
        """Asks for a stop at the next step boundary."""
        if save_checkpoint:
            self.stop.save_checkpoint = True
        self.stop.pause = False
        self.stop.requested.set()

    def pause(self) -> None:
        """Asks for a stop at the next step boundary that can be gone on from. One that stops already is left to."""
        with self._changed:
            if self._over or self.stop.requested.is_set():
                return
            self._append(_state(Training.STATE_PAUSING))
            self.stop.pause = True
            self.stop.requested.set()

    def wait_over(self) -> None:
        """Returns once the training is over."""
        with self._changed:
            self._changed.wait_for(lambda: self._over)

    def follow(self, after_sequence: int, is_wanted: Callable[[], bool]) -> Iterator[TrainingEvent]:
        """Yields the events after a sequence, as they come, up to the last one.

        Args:
            after_sequence: Last sequence that the caller has.
            is_wanted: Looked at while nothing happens; False ends the iteration.

        Raises:
            OutOfRangeError: The log does not have that sequence (SEQUENCE_OUT_OF_RANGE).
            UnslothdError: The log cannot be written; all that is in it has been yielded.
        """
        if after_sequence > self.last_sequence:
            raise _beyond_end(after_sequence, self.last_sequence)
        reader = EventLogReader(self._path)
        sequence = after_sequence
        while is_wanted():
            # Events beyond last_sequence are in the file already, but not yet promised to be on the disk.
            for entry in islice(reader.read(sequence), self.last_sequence - sequence):
                yield entry.event
                sequence = entry.event.sequence
            if self._wait_beyond(sequence):
                continue
            if self._over and self._log_error is not None:
                raise self._log_error
            if self._over:
                return

    def _outcome(self, engine: Engine) -> TrainingEvent:
        if self.stop.requested.is_set():
            return self._stopped_early()
        self._append(_state(Training.STATE_RUNNING))
        outcome = engine.train(self.request, self._emit, self.stop)
        if isinstance(outcome, TrainingPaused):
            return _state(Training.STATE_PAUSED)
        if isinstance(outcome, TrainingSucceeded):
            return TrainingEvent(succeeded=outcome)
        return TrainingEvent(cancelled=outcome)

    def _stopped_early(self) -> TrainingEvent:
        return _state(Training.STATE_PAUSED) if self.stop.pause else TrainingEvent(cancelled=TrainingCancelled())

    def _emit(self, event: TrainingEvent) -> None:
        self._append(event, fsync=event.HasField("checkpoint_saved"))
        if event.HasField("recovery"):  # the engine has repaired it and goes on at once
            self._append(_state(Training.STATE_RUNNING))

    def _append(self, event: TrainingEvent, *, fsync: bool = False) -> None:
        self.stop.beat()
        with self._changed:
            numbered = TrainingEvent()
            numbered.CopyFrom(event)
            numbered.sequence = self._last_sequence + 1
            numbered.training_id = self.request.training_id
            numbered.event_time.GetCurrentTime()
            self._writer.append(numbered, fsync=fsync)
            self._last_sequence = numbered.sequence
            self._changed.notify_all()

    def _wait_beyond(self, sequence: int) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._over or self.last_sequence > sequence, _CALLER_CHECK_S)
            return self.last_sequence > sequence


def _state(state: "Training.State.ValueType") -> TrainingEvent:
    return TrainingEvent(state_changed=TrainingStateChanged(state=state))


def _not_next(request: StartTrainingRequest, last_sequence: int) -> OutOfRangeError:
    return OutOfRangeError(
        ErrorReason.ERROR_REASON_SEQUENCE_OUT_OF_RANGE,
        f"The log of training '{request.training_id}' ends at event {last_sequence}, so next_sequence must be "
        f"{last_sequence + 1}, not {request.next_sequence}. Read the log again and hand the training over with that.",
        metadata={"last_sequence": str(last_sequence)},
    )


def _beyond_end(after_sequence: int, last_sequence: int) -> OutOfRangeError:
    return OutOfRangeError(
        ErrorReason.ERROR_REASON_SEQUENCE_OUT_OF_RANGE,
        f"after_sequence {after_sequence} is beyond the last event, {last_sequence}. "
        f"Watch with after_sequence {last_sequence} or less.",
        metadata={"last_sequence": str(last_sequence)},
    )
