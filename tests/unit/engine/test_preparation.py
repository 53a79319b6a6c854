"""What a training does before its first step is told while it lasts, and not where it is over at once."""

import pytest

from support.clock import Clock
from unslothd.v1.training_event_pb2 import TrainingEvent, TrainingPreparing
from unslothd_server.engine.preparation import QUIET_SECONDS, TELL_SECONDS, Preparation

ROWS, PASSES = TrainingPreparing.PHASE_READING_ROWS, TrainingPreparing.PHASE_MEASURING_PASSES


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def told() -> list[TrainingEvent]:
    return []


@pytest.fixture
def preparation(clock: Clock, told: list[TrainingEvent]) -> Preparation:
    return Preparation(told.append, clock)


def figures(told: list[TrainingEvent]) -> list[tuple[int, int]]:
    return [(event.preparing.phase, event.preparing.done) for event in told]


def test_what_is_over_soon_is_not_told(preparation: Preparation, clock: Clock, told: list[TrainingEvent]):
    preparation.begin(ROWS)
    for _ in range(1000):
        clock.now += 0.9 * QUIET_SECONDS / 1000
        preparation.one_begins()
    assert told == []


def test_what_lasts_is_told_now_and_then_with_what_is_done(
    preparation: Preparation, clock: Clock, told: list[TrainingEvent]
):
    preparation.begin(ROWS)
    for _ in range(12):
        clock.now += 1.0
        preparation.one_begins()
    assert (QUIET_SECONDS, TELL_SECONDS) == (2.0, 5.0)
    assert figures(told) == [(ROWS, 1), (ROWS, 6), (ROWS, 11)]


def test_every_phase_counts_anew(preparation: Preparation, clock: Clock, told: list[TrainingEvent]):
    preparation.begin(ROWS)
    preparation.one_begins()
    clock.now += QUIET_SECONDS
    preparation.begin(PASSES)
    preparation.one_begins()
    clock.now += QUIET_SECONDS
    preparation.one_begins()
    assert figures(told) == [(PASSES, 1)]
