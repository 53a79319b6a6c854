"""A real server with scripted workers: everything but the engine is what users get, in milliseconds."""

from collections.abc import Iterator

import pytest

from support.calls import prepared_model
from support.running_server import RunningServer, a_model
from unslothd.v1.model_pb2 import Model
from unslothd.v1.service_pb2_grpc import UnslothServiceStub


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    folder = tmp_path_factory.mktemp("server")
    with RunningServer(folder, fake_workers=True) as running:
        a_model(running, "tiny")
        yield running


@pytest.fixture(scope="module")
def stub(server: RunningServer) -> Iterator[UnslothServiceStub]:
    with server.channel() as channel:
        yield UnslothServiceStub(channel)


@pytest.fixture
def model(stub: UnslothServiceStub) -> Iterator[Model]:
    with prepared_model(stub, "tiny") as model:
        yield model
