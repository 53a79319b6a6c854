"""Fixtures for everything that trains on scripted workers."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from doubles.gates import StepGate


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[StepGate]:
    """Lets a scripted training go on step by step; open for good at the end, so that nothing waits for ever."""
    gate = StepGate(tmp_path / "gate")
    yield gate
    gate.open_all()
