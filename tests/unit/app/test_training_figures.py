"""What counts as work done, read off the events of a training."""

from unslothd.v1.training_event_pb2 import Recovery, StepProgress, TrainingEvent, TrainingStarted
from unslothd_server.app.training_figures import TrainingFigures


def step(number: int, tokens: int, speed: float = 10.0) -> TrainingEvent:
    return TrainingEvent(step=StepProgress(step=number, tokens=tokens, tokens_per_second=speed))


def started(first_step: int) -> TrainingEvent:
    return TrainingEvent(started=TrainingStarted(first_step=first_step))


def figures_of(*events: TrainingEvent) -> TrainingFigures:
    figures = TrainingFigures()
    for event in events:
        figures.see(event)
    return figures


def test_steps_between_logged_ones_count():
    figures = figures_of(started(1), step(10, 1000), step(20, 2000, speed=7.0))
    assert (figures.steps, figures.tokens, figures.tokens_per_second) == (20, 2000, 7.0)


def test_steps_that_are_done_again_after_a_repair_count_again():
    repair = TrainingEvent(recovery=Recovery(resume_step=10))
    figures = figures_of(
        started(1), step(10, 1000), step(15, 1500), repair, started(11), step(15, 1500), step(20, 2000)
    )
    assert (figures.steps, figures.recoveries) == (25, 1)


def test_tokens_never_go_back():
    assert figures_of(started(1), step(15, 1500), started(11), step(11, 1100), step(12, 1200)).tokens == 1600
