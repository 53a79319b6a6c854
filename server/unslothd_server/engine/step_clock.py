"""Seconds spent training, without those spent evaluating and saving."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from unslothd_server.engine.transfers import Moment


class StepClock:
    """A stop watch that starts with the first step and stands still while the trainer evaluates or saves.

    Args:
        now: Source of seconds.

    Attributes:
        at_step_end: What it showed when the last step was over that `note_step_end` was told of.
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now
        self.at_step_end = 0.0
        self._elapsed = 0.0
        self._started: float | None = None
        self._begin = Moment()

    def start(self) -> None:
        """Runs from here on; does nothing while it runs."""
        if self._started is None:
            self._started, self._begin = self._now(), Moment()

    def stop(self) -> None:
        """Stands still from here on; does nothing while it does."""
        if self._started is not None:
            self._elapsed += self._now() - self._started
            self._started = None

    def elapsed(self) -> float:
        """Seconds that it has run in all."""
        return self._elapsed + (self._now() - self._started if self._started is not None else 0.0)

    def note_step_end(self, moment: Moment) -> None:
        """Takes a step's end, which the device has reached, and since which the clock has not been stopped."""
        ran = moment.seconds_after(self._begin) if self._started is not None else 0.0
        self.at_step_end = self._elapsed + ran

    def go_on_from(self, seconds: float) -> None:
        """Adds what an earlier process of the same training spent."""
        self._elapsed += seconds

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Stands still inside; runs again afterwards if it ran before."""
        ran = self._started is not None
        self.stop()
        try:
            yield
        finally:
            if ran:
                self.start()
