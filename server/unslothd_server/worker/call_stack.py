"""Room for the frames of Python calls, so that none of a training's stands where Python has to map memory for it.

CPython takes memory for frames in chunks of 16 KiB, and unmaps one when the last frame in it returns. A loop whose
calls do not fit into a chunk any more maps, touches and unmaps one for every call: 9 microseconds in place of 0.1.
Where that falls depends on how deep the loop stands (docs/decisions/0016-room-for-calls.md).
"""

from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

_SLOT_BYTES = 8
# One more than fit into a chunk of 256 KiB: Python takes the next larger one, and half of it stays for the calls below.
# Those of a training take 12 KiB (52 frames, counted in a layer's products).
_SLOTS = 256 * 1024 // _SLOT_BYTES + 1


def with_room_for_calls(work: Callable[[], T]) -> T:
    """Returns what the work returns, or raises what it raises; its calls have room for about a thousand frames.

    Below those it is as without. The room is address space of 512 KiB, and memory only as far as calls reach.

    Args:
        work: Called once, on this thread.
    """
    return work()


# The depth of the evaluation stack is the one part of a frame whose size can be said and that Python does not fill.
with_room_for_calls.__code__ = with_room_for_calls.__code__.replace(co_stacksize=_SLOTS)
