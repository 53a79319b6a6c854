"""What `train`, `watch` and `generate` return: iterators that also know how it ends, in both ways of waiting."""

from collections.abc import AsyncIterator, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Self

from unslothd import errors
from unslothd._drive import AsyncDriver, SyncDriver
from unslothd._flows import Cursor, Outcome
from unslothd.v1.generation_pb2 import GenerateSummary
from unslothd.v1.training_event_pb2 import TrainingEvent
from unslothd.v1.training_pb2 import Training, TrainingMetrics

if TYPE_CHECKING:
    from unslothd._async_client import AsyncClient
    from unslothd._client import Client


class _Run:
    """What a run knows while it is read."""

    def __init__(self, cursor: Cursor, first: TrainingEvent | None, raises: bool) -> None:
        self._cursor = cursor
        self._raises = raises
        self._first = first
        self._delivered = cursor.sequence if first is None else 0

    @property
    def training_id(self) -> str:
        """Id of the training."""
        return self._cursor.training_id

    @property
    def last_sequence(self) -> int:
        """Sequence of the last event that was handed out; watch after it to go on from here."""
        return self._delivered

    def _handed_out(self, event: TrainingEvent) -> TrainingEvent:
        self._delivered = event.sequence
        return event

    def _take_first(self) -> TrainingEvent | None:
        first, self._first = self._first, None
        return first

    def _error_at_end(self, outcome: Outcome) -> errors.UnslothdError | None:
        """Returns the error that ends the iteration, the first time only, as iterators do."""
        error, self._raises = outcome.error if self._raises else None, False
        return error


def _metrics(outcome: Outcome) -> TrainingMetrics:
    if outcome.error is not None:
        raise outcome.error
    return outcome.metrics or TrainingMetrics()


class TrainingRun(_Run):
    """A training as it happens: iterate for its events, each exactly once, across lost connections.

    Leaving the loop, closing the run or ending the program leaves the training running (unless it was started with
    disconnect_policy="cancel"); `Client.watch` goes on reading it.
    """

    def __init__(
        self,
        client: "Client",
        cursor: Cursor,
        driver: SyncDriver[TrainingEvent, Outcome],
        *,
        first: TrainingEvent | None = None,
        raises: bool,
    ) -> None:
        super().__init__(cursor, first, raises)
        self._client = client
        self._driver = driver

    def __iter__(self) -> Iterator[TrainingEvent]:
        return self

    def __next__(self) -> TrainingEvent:
        event = self._take_first()
        if event is None:
            try:
                event = next(self._driver)
            except StopIteration:
                error = self._error_at_end(self._driver.result) if self._driver.finished else None
                if error is not None:
                    raise error from None
                raise
        return self._handed_out(event)

    def result(self) -> TrainingMetrics:
        """Waits for the end, drops the events on the way, and returns the final figures.

        While the training is paused it waits on, until somebody resumes or cancels it.

        Raises:
            TrainingFailed: It failed.
            TrainingCancelled: It was stopped on request.
            Unavailable: The server was away for longer than reconnect_timeout; the training may still run.
        """
        self._raises = False
        for _ in self:
            pass
        return _metrics(self._driver.result)

    def cancel(self, *, save_checkpoint: bool = True) -> Training:
        """Asks the training to stop at the next step boundary; the events go on up to the cancelled one."""
        return self._client.cancel(self.training_id, save_checkpoint=save_checkpoint)

    def pause(self) -> Training:
        """Asks the training to save at the next step boundary and to free its device.

        The events go on when it is resumed; to leave until then, close the run and `Client.resume` later.
        """
        return self._client.pause(self.training_id)

    def close(self) -> None:
        """Stops reading."""
        self._driver.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class AsyncTrainingRun(_Run):
    """As TrainingRun, for asyncio."""

    def __init__(
        self,
        client: "AsyncClient",
        cursor: Cursor,
        driver: AsyncDriver[TrainingEvent, Outcome],
        *,
        first: TrainingEvent | None = None,
        raises: bool,
    ) -> None:
        super().__init__(cursor, first, raises)
        self._client = client
        self._driver = driver

    def __aiter__(self) -> AsyncIterator[TrainingEvent]:
        return self

    async def __anext__(self) -> TrainingEvent:
        event = self._take_first()
        if event is None:
            try:
                event = await anext(self._driver)
            except StopAsyncIteration:
                error = self._error_at_end(self._driver.result) if self._driver.finished else None
                if error is not None:
                    raise error from None
                raise
        return self._handed_out(event)

    async def result(self) -> TrainingMetrics:
        """As TrainingRun.result."""
        self._raises = False
        async for _ in self:
            pass
        return _metrics(self._driver.result)

    async def cancel(self, *, save_checkpoint: bool = True) -> Training:
        """As TrainingRun.cancel."""
        return await self._client.cancel(self.training_id, save_checkpoint=save_checkpoint)

    async def pause(self) -> Training:
        """As TrainingRun.pause."""
        return await self._client.pause(self.training_id)

    def close(self) -> None:
        """Stops reading."""
        self._driver.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class TextStream:
    """Text as the model makes it: iterate for its pieces."""

    def __init__(self, driver: SyncDriver[str, GenerateSummary | None]) -> None:
        self._driver = driver

    @property
    def summary(self) -> GenerateSummary | None:
        """Tokens, speed and why it ended; None until the text has been read to its end."""
        return self._driver.result if self._driver.finished else None

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        return next(self._driver)

    def text(self) -> str:
        """Waits for the end and returns the text from here on."""
        return "".join(self)

    def close(self) -> None:
        """Stops the generation."""
        self._driver.close()


class AsyncTextStream:
    """As TextStream, for asyncio."""

    def __init__(self, driver: AsyncDriver[str, GenerateSummary | None]) -> None:
        self._driver = driver

    @property
    def summary(self) -> GenerateSummary | None:
        """Tokens, speed and why it ended; None until the text has been read to its end."""
        return self._driver.result if self._driver.finished else None

    def __aiter__(self) -> AsyncIterator[str]:
        return self

    async def __anext__(self) -> str:
        return await anext(self._driver)

    async def text(self) -> str:
        """As TextStream.text."""
        return "".join([piece async for piece in self])

    def close(self) -> None:
        """Stops the generation."""
        self._driver.close()
