"""A real server with scripted workers: everything but the engine is what users get, in milliseconds."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.running_server import RunningServer
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


def a_model(server: RunningServer, name: str, **knobs: object) -> Path:
    """A folder that looks like a model, with knobs for the scripted engine."""
    folder = server.model_root / name
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "fake.json").write_text(json.dumps(knobs))
    return folder
