"""A GPU host: a server, and a randomly initialised Llama of a true shape."""

import os
from collections.abc import Iterator
from pathlib import Path

import pynvml
import pytest

from support.gpu_models import RandomModels
from support.running_server import RunningServer
from unslothd.v1.service_pb2_grpc import UnslothServiceStub
from unslothd_server.engine.unsloth_engine import UnslothEngine


@pytest.fixture(scope="session", autouse=True)
def gpu() -> None:
    """Without one, every test would end in a trace of its own."""
    try:
        pynvml.nvmlInit()
        found = pynvml.nvmlDeviceGetCount()
    except pynvml.NVMLError:
        found = 0
    if not found:
        pytest.fail("this host has no NVIDIA GPU; run `make test-gpu` on one that has", pytrace=False)


@pytest.fixture(scope="session")
def random_models(tmp_path_factory: pytest.TempPathFactory) -> RandomModels:
    folder = tmp_path_factory.getbasetemp()
    # pytest-xdist gives each of its processes a folder in that of the run.
    return RandomModels((folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "random-models")


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory, random_models: RandomModels) -> Iterator[RunningServer]:
    folder = tmp_path_factory.mktemp("gpu")
    random_models.made()
    with RunningServer(folder, arguments=("--model-root", str(random_models.root))) as running:
        yield running
        print(running.log.read_text()[-4000:])


@pytest.fixture(scope="session")
def stub(server: RunningServer) -> Iterator[UnslothServiceStub]:
    with server.channel() as channel:
        yield UnslothServiceStub(channel)


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """For tests of the engine in this process: its libraries, which write to the folder they run in."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("cwd"))
        UnslothEngine().import_libraries()
        yield


@pytest.fixture(scope="module")
def base(libraries: None, random_models: RandomModels) -> Path:
    """The Llama of the server, for tests of the engine in this process."""
    return random_models.made()
