"""The real adapter as hosts start it, spoken to by the SDK's own client, before a real server with scripted workers."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from doubles.gates import StepGate
from support.running_server import RunningServer


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    with RunningServer(tmp_path_factory.mktemp("server"), fake_workers=True) as running:
        folder = running.model_root / "tiny"
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        (folder / "fake.json").write_text(json.dumps({}))
        yield running


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[StepGate]:
    gate = StepGate(tmp_path / "gate")
    yield gate
    gate.open_all()
