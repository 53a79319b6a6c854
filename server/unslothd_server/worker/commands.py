"""Work for the main thread, posted by the threads of gRPC: one command at a time, in the order of posting.

Unsloth, torch and their signal handling belong on the main thread; gRPC's threads only wait for what it makes.
"""

from collections.abc import Callable, Iterator
from queue import SimpleQueue
from threading import Event
from typing import Generic, TypeVar

from unslothd_server.worker.call_stack import with_room_for_calls
from unslothd_server.worker.faults import end_if_device_is_lost

T = TypeVar("T")


class Command(Generic[T]):
    """A piece of work that yields items while it runs.

    Args:
        work: Called on the main thread with a function that takes the items.
    """

    def __init__(self, work: Callable[[Callable[[T], None]], None]) -> None:
        self._work = work
        self._items: SimpleQueue[tuple[T] | BaseException | None] = SimpleQueue()

    def execute(self) -> None:
        """Runs the work; what it raises is raised by `items`. For the main thread.

        Raises:
            DeviceLostError: The process has to end.
        """
        try:
            self._work(lambda item: self._items.put((item,)))
        except (Exception, SystemExit) as error:  # noqa: BLE001 - it belongs to the thread that posted the command
            end_if_device_is_lost(error)
            self._items.put(error)
        else:
            self._items.put(None)

    def items(self) -> Iterator[T]:
        """Yields the items as they come until the work is done. For the thread that posted the command."""
        while True:
            item = self._items.get()
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            yield item[0]


class CommandQueue:
    """The commands that wait for the main thread."""

    def __init__(self) -> None:
        self._waiting: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._imported = Event()

    @property
    def has_imported(self) -> bool:
        """True once the main thread takes commands: what it had to import is imported."""
        return self._imported.is_set()

    def wait_imported(self) -> None:
        """Returns once the main thread takes commands."""
        self._imported.wait()

    def post(self, command: Callable[[], None]) -> None:
        """Adds a command; what it raises ends the worker."""
        self._waiting.put(command)

    def run_forever(self) -> None:
        """Runs the commands as they come. For the main thread."""
        self._imported.set()
        with_room_for_calls(self._run_all)

    def _run_all(self) -> None:
        while True:
            self._waiting.get()()
