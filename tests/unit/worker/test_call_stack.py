"""Commands of a worker's main thread have room for their frames, so that no call maps memory."""

import mmap
import resource
from collections.abc import Callable
from typing import Any

import pytest

from unslothd_server.worker.call_stack import with_room_for_calls
from unslothd_server.worker.commands import CommandQueue

CALLS = 500
# Frames of these functions fill a chunk of 16 KiB more than twice.
DEPTHS = range(300)


@pytest.fixture(autouse=True)
def _page_faults_are_counted() -> None:
    """Some sandboxes have a kernel of their own that does not."""
    before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
    with mmap.mmap(-1, 64 * mmap.PAGESIZE) as pages:
        for start in range(0, len(pages), mmap.PAGESIZE):
            pages[start] = 1
    if resource.getrusage(resource.RUSAGE_THREAD).ru_minflt == before:
        pytest.skip("the kernel does not count page faults")


class OverError(Exception):
    """Ends the queue, as everything that a command raises does."""


def call_often() -> int:
    """Page faults of so many calls in a row."""

    def nothing() -> None:
        pass

    before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
    for _ in range(CALLS):
        nothing()
    return resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before


def at_depth(depth: int, work: Callable[[], Any]) -> Any:
    return at_depth(depth - 1, work) if depth else work()


def depths_with_faults() -> list[int]:
    """Depths at which calls met pages that were not there, time and again."""
    return [depth for depth in DEPTHS if at_depth(depth, call_often) >= CALLS // 2]


def test_python_maps_memory_for_every_call_at_some_depth():
    # Where this fails, Python keeps the memory itself, and `call_stack` can go.
    assert depths_with_faults()


def test_with_room_no_depth_makes_calls_map_memory():
    assert with_room_for_calls(depths_with_faults) == []


def test_commands_have_that_room():
    queue, found = CommandQueue(), list[list[int]]()

    def command() -> None:
        found.append(depths_with_faults())
        raise OverError

    queue.post(command)
    with pytest.raises(OverError):
        queue.run_forever()
    assert found == [[]]


def test_what_the_work_raises_is_raised():
    def fail() -> None:
        raise OverError

    with pytest.raises(OverError):
        with_room_for_calls(fail)
