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
