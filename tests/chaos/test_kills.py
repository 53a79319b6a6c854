"""The short form of `make chaos`: one real training, three killed servers, one killed worker."""

from pathlib import Path

import pytest

from chaos.scenario import campaign


@pytest.mark.timeout(600)
def test_kills_at_random_steps_lose_and_double_nothing_and_change_no_bit(tmp_path: Path):
    (report,) = campaign(tmp_path, seed=7, trainings=1, server_kills=3, worker_kills=1, seeds=1)
    assert report.problems == []
    assert (report.server_kills, report.worker_kills) == (3, 1)
