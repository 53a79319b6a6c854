"""Waiting for what nobody tells: bounded, and over as soon as it is there."""

import time
from collections.abc import Callable

WAIT_SECONDS = 30.0
_LOOK_SECONDS = 0.01


def wait_until(condition: Callable[[], bool]) -> None:
    """Returns once the condition holds; fails after WAIT_SECONDS."""
    end = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(_LOOK_SECONDS)
