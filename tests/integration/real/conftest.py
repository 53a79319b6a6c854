"""A real server with real workers: real Unsloth on this CPU, on a tiny random Llama."""

from collections.abc import Iterator

import pytest

from support.calls import load
from support.refusing_hub import OPERATORS_TOKEN, RefusingHub
from support.running_server import RunningServer
from support.tiny_model import build_tiny_llama
from unslothd.v1 import service_pb2 as pb
from unslothd.v1.model_pb2 import Model
from unslothd.v1.service_pb2_grpc import UnslothServiceStub


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    with RunningServer(tmp_path_factory.mktemp("real")) as running:
        build_tiny_llama(running.model_root / "tiny")
        yield running


@pytest.fixture(scope="session")
def hub() -> Iterator[RefusingHub]:
    with RefusingHub() as running:
        yield running


@pytest.fixture(scope="session")
def warm(tmp_path_factory: pytest.TempPathFactory, hub: RefusingHub) -> Iterator[RunningServer]:
    """A server with a spare, of an operator who has a Hub token; its Hub refuses everybody."""
    folder = tmp_path_factory.mktemp("warm")
    hub_settings = {"HF_ENDPOINT": hub.address, "HF_HUB_OFFLINE": "0", "HF_HOME": str(folder / "hub"), "no_proxy": "*"}
    with RunningServer(
        folder,
        arguments=("--warm-workers", "1", "--verbose"),
        environment={"HF_TOKEN": OPERATORS_TOKEN, **hub_settings},
    ) as running:
        build_tiny_llama(running.model_root / "tiny")
        yield running


@pytest.fixture(scope="session")
def stub(server: RunningServer) -> Iterator[UnslothServiceStub]:
    with server.channel() as channel:
        yield UnslothServiceStub(channel)


@pytest.fixture(scope="module")
def loaded(stub: UnslothServiceStub) -> Iterator[Model]:
    """One worker for each file: its import takes most of the time, and a model keeps its first adapter."""
    model = load(stub, "tiny", max_seq_length=128)
    yield model
    stub.UnloadModel(pb.UnloadModelRequest(model_id=model.model_id, force=True), timeout=120)
