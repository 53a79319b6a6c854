"""What a logged step says of a training that does not learn."""

import math

from unslothd.v1.training_event_pb2 import StepProgress
from unslothd_server.engine.honesty import LASTING_STEPS, StepWatch


def told(watch: StepWatch, losses: list[float], grad_norm: float = 1.0) -> list[tuple[int, str]]:
    """Step and reason of every warning."""
    return [
        (step, warning.reason)
        for step, loss in enumerate(losses, start=1)
        for warning in watch.look(StepProgress(step=step, loss=loss, grad_norm=grad_norm))
    ]


def test_a_step_with_finite_figures_and_gradients_deserves_no_warning() -> None:
    assert told(StepWatch(), [2.0, 1.0, 0.0]) == []


def test_zero_gradients_are_told_once() -> None:
    assert told(StepWatch(), [2.0, 2.0, 2.0], grad_norm=0.0) == [(1, "ZERO_GRADIENTS")]


def test_an_infinite_gradient_is_as_bad_as_a_loss_that_is_not_a_number() -> None:
    assert told(StepWatch(), [2.0], grad_norm=math.inf) == [(1, "NOT_FINITE")]
    assert told(StepWatch(), [math.nan]) == [(1, "NOT_FINITE")]


def test_it_is_said_again_only_when_it_lasts() -> None:
    bad, good = [math.nan], [2.0]
    almost = [*bad * (LASTING_STEPS - 1), *good] * 3
    assert told(StepWatch(), almost) == [(1, "NOT_FINITE")]
    lasting = [*good, *bad * 3 * LASTING_STEPS]
    assert told(StepWatch(), lasting) == [(2, "NOT_FINITE"), (1 + LASTING_STEPS, "NOT_FINITE")]
