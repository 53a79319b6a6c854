"""Figures on their way from the device; without a GPU they are there at once."""

import math
from typing import Any

from unslothd_server.engine.transfers import Moment, Reading


class OneNumber:
    """What a reading asks of a tensor on the host."""

    is_cuda = False

    def __init__(self, value: float) -> None:
        self.value = value

    def __float__(self) -> float:
        return self.value


def test_numbers_on_the_host_are_there_at_once_and_stay_as_they_were() -> None:
    loss = OneNumber(0.1)
    reading = Reading([loss, 2.5, 2**53])
    loss.value = 7.0
    assert reading.ready
    assert reading.values() == [0.1, 2.5, 2**53]


def test_a_loss_that_is_no_number_is_read_as_it_is() -> None:
    (value,) = Reading([math.nan]).values()
    assert math.isnan(value)


def test_without_a_device_a_moment_is_reached_when_it_is_made(monkeypatch: Any) -> None:
    times = iter([10.0, 12.5])
    monkeypatch.setattr("unslothd_server.engine.transfers.time.perf_counter", lambda: next(times))
    earlier, later = Moment(), Moment()
    assert later.reached
    assert later.seconds_after(earlier) == 2.5
