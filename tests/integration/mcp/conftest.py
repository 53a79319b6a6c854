"""The real adapter as hosts start it, spoken to by the SDK's own client, before a real server with scripted workers."""

from collections.abc import Iterator

import pytest

from support.calls import prepared_model
from support.running_server import RunningServer, a_model
from unslothd.v1.service_pb2_grpc import UnslothServiceStub
from unslothd.v1.training_pb2 import TrainingConfig


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    with RunningServer(tmp_path_factory.mktemp("server"), fake_workers=True) as running:
        a_model(running, "tiny")
        yield running


@pytest.fixture(scope="module")
def stub(server: RunningServer) -> Iterator[UnslothServiceStub]:
    with server.channel() as channel:
        yield UnslothServiceStub(channel)


@pytest.fixture
def model_id(stub: UnslothServiceStub) -> Iterator[str]:
    """A loaded and prepared model, three steps a training."""
    with prepared_model(stub, "tiny", TrainingConfig(max_steps=3)) as model:
        yield model.model_id
