"""Costs of passes on the disk: kept where that is possible, and never a reason to end a training."""

from pathlib import Path

from unslothd_server.engine import pass_costs
from unslothd_server.engine.micro_batching import PassCost

COSTS = [PassCost(True, False, 0.1, 1e-5, 1e8, 1e6, 4096)]


def test_costs_are_read_as_they_were_written_until_there_is_much_more_room(tmp_path: Path):
    file = tmp_path / "passes" / "1.json"
    pass_costs.write(file, 1000, COSTS)
    assert pass_costs.read(file, 1200) == COSTS
    assert pass_costs.read(file, 1300) == []


def test_a_disk_that_takes_nothing_costs_only_the_memory(tmp_path: Path):
    (tmp_path / "passes").write_text("no folder")
    pass_costs.write(tmp_path / "passes" / "1.json", 1000, COSTS)
    assert pass_costs.read(tmp_path / "passes" / "1.json", 1000) == []
