"""Waiting for what nobody tells: bounded, and over as soon as it is there."""

import time
from collections.abc import Callable

WAIT_SECONDS = 30.0
_LOOK_SECONDS = 0.01


def wait_until(condition: Callable[[], bool], seconds: float = WAIT_SECONDS) -> None:
    """Returns once the condition holds; fails after so many seconds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(_LOOK_SECONDS)
