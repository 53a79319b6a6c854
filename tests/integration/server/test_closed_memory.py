"""What other processes of the server's user see of it: not its memory, not its environment, unless they are let in."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.heeding_modes import heeding_modes
from support.running_server import RunningServer

PLANTED = "hf_PlantedInTheEnvironment012345"
LOOK = """
import sys
for name in ("environ", "mem"):
    try:
        with open(f"/proc/{sys.argv[1]}/{name}", "rb") as stream:
            print(name, "open", stream.read().decode(errors="replace") if name == "environ" else "")
    except OSError as error:
        print(name, "closed", error.strerror)
"""


def start(folder: Path, allowed: str) -> RunningServer:
    environment = {"HF_TOKEN": PLANTED, "UNSLOTHD_ALLOW_DEBUGGERS": allowed}
    return RunningServer(folder, fake_workers=True, heeds_modes=True, environment=environment)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    with start(tmp_path_factory.mktemp("closed"), "no") as running:
        yield running


def seen_by_a_neighbour(server: RunningServer) -> str:
    command = heeding_modes([sys.executable, "-c", LOOK, str(server.process.pid)])
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout


def test_neither_memory_nor_environment_can_be_read(server: RunningServer):
    seen = seen_by_a_neighbour(server)
    assert "environ closed" in seen
    assert "mem closed" in seen
    assert PLANTED not in seen


def test_an_operator_can_let_debuggers_in(tmp_path: Path):
    with start(tmp_path, "yes") as server:
        seen = seen_by_a_neighbour(server)
    assert "mem open" in seen
    assert PLANTED in seen
