"""One writer, any number of readers, each at its own pace: the wake-up under every progress and event stream."""

import asyncio
from collections.abc import AsyncIterator
from typing import Generic, TypeVar

T = TypeVar("T")


class WakeUp:
    """Lets any number of coroutines wait for the next change of something."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def notify(self) -> None:
        """Wakes all that wait now."""
        self._event.set()
        self._event = asyncio.Event()

    async def wait(self, timeout: float | None = None) -> bool:
        """Waits for the next `notify`; False when `timeout` seconds passed without one."""
        try:
            async with asyncio.timeout(timeout):
                await self._event.wait()
        except TimeoutError:
            return False
        return True


class Broadcast(Generic[T]):
    """A list that grows until it is closed; readers see every item, late ones too."""

    def __init__(self) -> None:
        self._items: list[T] = []
        self._closed = False
        self._error: Exception | None = None
        self._changed = WakeUp()

    def append(self, item: T) -> None:
        """Adds an item."""
        self._items.append(item)
        self._changed.notify()

    def close(self, error: Exception | None = None) -> None:
        """Ends every reader after the last item, with the error if there is one. The first close counts."""
        if not self._closed:
            self._closed, self._error = True, error
            self._changed.notify()

    async def follow(self) -> AsyncIterator[T]:
        """Yields every item from the first, then new ones, until closed."""
        position = 0
        while True:
            if position < len(self._items):
                yield self._items[position]
                position += 1
            elif self._closed:
                if self._error is not None:
                    raise self._error
                return
            else:
                await self._changed.wait()
