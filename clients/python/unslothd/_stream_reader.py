"""Reads a stream in a thread of its own, where no KeyboardInterrupt can strike.

Python raises KeyboardInterrupt in the main thread, at any place. Where grpc has just taken a lock there, the lock stays
taken for ever: the thread that serves the channel waits for it, no call of the channel ends any more, and none can be
cancelled. So the main thread waits outside grpc, at places that it can leave and come back to.
"""

import _thread
import weakref
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any

# Seconds, as in grpc: Python tells the main thread of a signal that came just before a wait only when the wait is over.
LONGEST_WAIT = 0.2


@dataclass(frozen=True)
class _Outcome:
    """What reading gave: a message, None at the end of the stream, or an error."""

    message: Any
    error: BaseException | None = None

    @property
    def is_last(self) -> bool:
        return self.message is None


class StreamReader:
    """Gives the messages of a stream one by one.

    Args:
        stream: Nobody else reads it. It may be cancelled from any thread.
    """

    def __init__(self, stream: Iterator[Any]) -> None:
        self._shared = _Shared(stream)
        # A stream that is dropped before its end has nobody who would end its thread.
        weakref.finalize(self, self._shared.leave).atexit = False
        # A threading.Thread waits until it runs, by a lock that an interrupt could leave taken too.
        _thread.start_new_thread(self._shared.read, ())

    def next(self) -> Any:
        """Waits for the next message, and returns None at the end of the stream. Raises what the stream raises.

        After a KeyboardInterrupt it can be called again, and gives the same message: only one that strikes as a message
        is returned takes it along.
        """
        shared = self._shared
        shared.asked.put(None)
        while (outcome := shared.outcome) is None:
            with suppress(Empty):
                shared.answered.get(timeout=LONGEST_WAIT)
        if not outcome.is_last:
            shared.outcome = None
        if outcome.error is not None:
            raise outcome.error
        return outcome.message


class _Shared:
    """What a reader and its thread both know; the thread knows nothing of the reader, so that a reader can be dropped.

    Both queues only wake the other side, and may do so once too often: what counts is whether there is an outcome.
    """

    def __init__(self, stream: Iterator[Any]) -> None:
        self.asked: SimpleQueue[None] = SimpleQueue()
        self.answered: SimpleQueue[None] = SimpleQueue()
        self.outcome: _Outcome | None = None
        self._stream = stream
        self._left = False

    def leave(self) -> None:
        """Ends the thread, once it waits for nothing but to be asked."""
        self._left = True
        self.asked.put(None)

    def read(self) -> None:
        """Reads a message whenever it is asked to and the last one was taken."""
        outcome = None
        while outcome is None or not outcome.is_last:
            self.asked.get()
            if self._left:
                return
            if self.outcome is None:
                self.outcome = outcome = self._next()
            self.answered.put(None)

    def _next(self) -> _Outcome:
        try:
            return _Outcome(next(self._stream, None))
        except BaseException as error:  # noqa: BLE001 - for the reader to raise
            return _Outcome(None, error)
