"""Commands: the main thread works, the thread that posted gets the items and the error."""

from collections.abc import Callable
from threading import Thread

import pytest

from unslothd_server.worker.commands import Command


def test_items_arrive_in_order_and_end_with_the_work():
    def work(put: Callable[[int], None]) -> None:
        for number in range(100):
            put(number)

    command = Command(work)
    worker = Thread(target=command.execute)
    worker.start()

    assert list(command.items()) == list(range(100))
    worker.join(10)


@pytest.mark.parametrize("error", [ValueError("x"), SystemExit(1)])
def test_what_the_work_raises_is_raised_where_the_items_are_read(error: BaseException):
    def work(put: Callable[[int], None]) -> None:
        put(1)
        raise error

    command = Command(work)
    command.execute()
    items = command.items()

    assert next(items) == 1
    with pytest.raises(type(error)) as caught:
        next(items)
    assert caught.value is error


def test_an_item_may_be_none():
    command: Command[None] = Command(lambda put: put(None))
    command.execute()

    assert list(command.items()) == [None]
