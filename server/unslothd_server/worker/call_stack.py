"""Room for the frames of Python calls, so that none of a training's stands where Python has to map memory for it.

CPython takes memory for frames in chunks of 16 KiB, and unmaps one when the last frame in it returns. A loop whose
calls do not fit into a chunk any more maps, touches and unmaps one for every call: 9 microseconds in place of 0.1.
Where that falls depends on how deep the loop stands (docs/decisions/0016-room-for-calls.md).
"""

from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

# Of 8 bytes each. A few too many for a chunk of 256 KiB, so that half of the next larger one stays for the calls below;
# those of a training take 12 KiB (52 frames, counted in a layer's products).
_SLOTS = 32_000


def with_room_for_calls(work: Callable[[], T]) -> T:
    """Calls it in a frame that claims a chunk of 512 KiB, of which what is not used is not touched either.

    Args:
        work: What is called often in there must not be deeper than some hundred frames.
    """
    return work()


# The depth of the evaluation stack is the one part of a frame whose size can be said and that Python does not fill.
with_room_for_calls.__code__ = with_room_for_calls.__code__.replace(co_stacksize=_SLOTS)
