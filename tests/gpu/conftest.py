"""A GPU host: a server, and a randomly initialised Llama of a true shape."""

from collections.abc import Iterator

import pytest

from support.gpu_models import make_model
from support.running_server import RunningServer
from unslothd.v1.service_pb2_grpc import UnslothServiceStub


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
