"""What a training does before its first step, told to whoever waits for that step."""

import time
from collections.abc import Callable

from unslothd.v1.training_event_pb2 import TrainingEvent, TrainingPreparing

# What is over sooner is not told.
QUIET_SECONDS = 2.0
TELL_SECONDS = 5.0


class Preparation:
    """Counts the rows or passes of a phase, and tells them now and then while it lasts.

    Args:
        emit: Takes events.
        clock: In seconds.
    """

    def __init__(self, emit: Callable[[TrainingEvent], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._emit = emit
        self._clock = clock
        self._phase = TrainingPreparing.PHASE_UNSPECIFIED
        self._done = 0
        self._tell_at = 0.0

    def begin(self, phase: "TrainingPreparing.Phase.ValueType") -> None:
        """Another phase begins; nothing of it is done."""
        self._phase, self._done = phase, 0
        self._tell_at = self._clock() + QUIET_SECONDS

    def one_begins(self) -> None:
        """The next row or pass begins, so the ones before it are done."""
        now = self._clock()
        if now >= self._tell_at:
            self._emit(TrainingEvent(preparing=TrainingPreparing(phase=self._phase, done=self._done)))
            self._tell_at = now + TELL_SECONDS
        self._done += 1
