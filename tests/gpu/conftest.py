"""A GPU host: a server, and a randomly initialised Llama of a true shape."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from support import random_llama
from support.running_server import RunningServer
from unslothd.v1.service_pb2_grpc import UnslothServiceStub

BUILD_SECONDS = 240.0


def make_model(folder: Path) -> None:
    """Writes a random Llama of the shape of the 1B one."""
    build = [sys.executable, str(Path(random_llama.__file__)), str(folder), "llama-3.2-1b"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run(build, check=True, timeout=BUILD_SECONDS, env=environment)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    folder = tmp_path_factory.mktemp("gpu")
    with RunningServer(folder) as running:
        make_model(running.model_root / "llama-1b")
        yield running
        print(running.log.read_text()[-4000:])


@pytest.fixture(scope="session")
def stub(server: RunningServer) -> Iterator[UnslothServiceStub]:
    with server.channel() as channel:
        yield UnslothServiceStub(channel)
