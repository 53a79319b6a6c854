"""The clock of a training counts steps only."""

from unslothd_server.engine.step_clock import StepClock


def test_time_spent_evaluating_and_saving_is_not_counted() -> None:
    seconds = iter(range(0, 1000, 10))
    clock = StepClock(now=lambda: float(next(seconds)))
    clock.start()  # 0
    with clock.stopped():  # 10 to 20
        pass
    clock.stop()  # 30
    assert clock.elapsed() == 20


def test_a_clock_that_stood_still_stays_so_after_an_evaluation() -> None:
    clock = StepClock(now=lambda: 0.0)
    with clock.stopped():
        pass
    assert clock.elapsed() == 0


def test_a_resumed_training_goes_on_from_the_seconds_of_the_earlier_process() -> None:
    clock = StepClock(now=lambda: 0.0)
    clock.go_on_from(12.5)
    assert clock.elapsed() == 12.5


class At:
    """A moment so many seconds after the clock was started."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def seconds_after(self, begin: object) -> float:
        return self._seconds


def test_a_step_that_is_told_late_took_no_longer_for_that() -> None:
    seconds = iter(range(0, 1000, 10))
    clock = StepClock(now=lambda: float(next(seconds)))
    clock.go_on_from(100.0)
    clock.start()
    clock.note_step_end(At(4.0))
    first = clock.at_step_end
    clock.note_step_end(At(8.0))
    assert (first, clock.at_step_end) == (104.0, 108.0)


def test_a_step_end_is_counted_from_the_last_start() -> None:
    seconds = iter(range(0, 1000, 10))
    clock = StepClock(now=lambda: float(next(seconds)))
    clock.start()  # 0
    clock.stop()  # 10
    clock.start()  # 20
    clock.note_step_end(At(3.0))
    assert clock.at_step_end == 13.0
