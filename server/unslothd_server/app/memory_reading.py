"""What memory a worker holds: asked seldom, however many callers want to know."""

import asyncio
import contextlib
import time
from collections.abc import Callable

from unslothd_server.app.ports import Worker
from unslothd_server.errors import UnslothdError

# The answer comes from the process that trains, and takes the interpreter from the training meanwhile.
_ASK_AGAIN_SECONDS = 1.0
# A worker answers within milliseconds, or later while it imports or trains; readers do not wait.
_ANSWER_SECONDS = 2.0


class MemoryReading:
    """Reads the memory of one model's worker; callers that come meanwhile share the answer.

    Args:
        clock: Seconds from any fixed point.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._asked_at = float("-inf")
        self._answer: asyncio.Task[int | None] | None = None

    async def newer(self, worker: Worker) -> int | None:
        """Returns the bytes that a worker holds; None when it said so a second ago, or does not answer in 2 s."""
        if self._answer is None or self._answer.done():
            if self._clock() - self._asked_at < _ASK_AGAIN_SECONDS:
                return None
            self._asked_at = self._clock()
            self._answer = asyncio.create_task(_held_by(worker), name=f"read the memory of {worker.model_id}")
        await asyncio.wait([self._answer], timeout=_ANSWER_SECONDS)
        return self._answer.result() if self._answer.done() else None


async def _held_by(worker: Worker) -> int | None:
    with contextlib.suppress(UnslothdError):
        return (await worker.status()).model.memory_bytes
    return None
