"""What is known of a run, before and after a checkpoint."""

import math
from pathlib import Path

from unslothd_server.engine.memory import PeakMemory
from unslothd_server.engine.passes import PassSplit
from unslothd_server.engine.run_figures import STATE_NAME, Evaluations, LogInterval, RunFigures
from unslothd_server.engine.step_clock import StepClock


def test_an_evaluation_is_the_best_when_none_before_it_was_lower() -> None:
    evaluations = Evaluations()
    assert [evaluations.take(step, loss) for step, loss in enumerate([2.0, 1.5, 1.5, 1.6, 1.4])] == [
        True,
        True,
        True,
        False,
        True,
    ]


def test_only_a_lower_loss_is_a_gain() -> None:
    evaluations = Evaluations()
    counts: list[int] = []
    for step, loss in enumerate([2.0, 1.5, 1.5, math.nan, 1.6, 1.4]):
        evaluations.take(step, loss)
        counts.append(evaluations.without_gain)
    assert counts == [0, 0, 1, 2, 3, 0]
    assert evaluations.best_loss == 1.4


def test_a_loss_belongs_to_its_step() -> None:
    evaluations = Evaluations()
    evaluations.take(4, 1.5)
    assert (evaluations.loss_at(4), evaluations.loss_at(5)) == (1.5, None)


def test_everything_that_a_resume_needs_survives_in_the_checkpoint(tmp_path: Path) -> None:
    before = RunFigures(StepClock(), PeakMemory())
    before.clock.go_on_from(12.5)
    before.evaluations = Evaluations(loss=0.1, step=4, over_step=5, best_loss=math.inf, without_gain=2)
    before.interval = LogInterval(step=4, tokens=1000, seconds=10.0, loss_sum=0.1 + 0.2)
    before.write(tmp_path)
    after = RunFigures(StepClock(), PeakMemory())
    after.restore(tmp_path, 6)
    assert after.clock.elapsed() == 12.5
    assert (after.evaluations, after.interval) == (before.evaluations, before.interval)
    assert after.saved_step == 6


def test_a_checkpoint_of_the_first_version_is_read(tmp_path: Path) -> None:
    (tmp_path / STATE_NAME).write_text(
        '{"seconds": 12.5, '
        '"evaluations": {"loss": 0.1, "step": 4, "over_step": 5, "best_loss": 0.1, "without_gain": 0}, '
        '"interval": {"step": 4, "tokens": 1000, "seconds": 10.0, "loss_sum": 0.3}}'
    )
    after = RunFigures(StepClock(), PeakMemory())
    after.restore(tmp_path, 6)
    assert (after.clock.elapsed(), after.interval.tokens, after.split) == (12.5, 1000, PassSplit())
