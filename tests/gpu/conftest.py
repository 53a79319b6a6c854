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
    with RunningServer(folder) as running:
        random_models.put(running.model_root / "llama-1b")
        yield running
        print(running.log.read_text()[-4000:])


@pytest.fixture(scope="session")
def stub(server: RunningServer) -> Iterator[UnslothServiceStub]:
    with server.channel() as channel:
        yield UnslothServiceStub(channel)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, random_models: RandomModels) -> Iterator[Path]:
    """The same Llama for tests of the engine in this process, with its libraries imported."""
    folder = tmp_path_factory.mktemp("models") / "llama-1b"
    random_models.put(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("cwd"))
        UnslothEngine().import_libraries()
        yield folder
