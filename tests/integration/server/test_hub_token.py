"""A Hub token that crosses a network in plain text is refused by a real server and leaves no trace there."""

import socket
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from support.calls import CallError, error_of, load
from support.certificates import Authority
from support.running_server import RunningServer, a_model
from unslothd.v1 import service_pb2 as pb
from unslothd.v1.service_pb2_grpc import UnslothServiceStub

TOKEN = "hf_PlantedOnAPlainConnection"
EVERYWHERE = ("--listen", "0.0.0.0:0", "--require-identity", "no", "--verbose")


@pytest.fixture(scope="module")
def own_address() -> str:
    """An address of this host that other hosts could reach."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("198.51.100.1", 9))  # a route is looked up; nothing is sent
        except OSError:
            pytest.skip("this host has no address but the loopback")
        return probe.getsockname()[0]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A server that other hosts reach without TLS, as its operator wants it."""
    arguments = (*EVERYWHERE, "--allow-insecure-listen")
    with RunningServer(tmp_path_factory.mktemp("plain"), fake_workers=True, arguments=arguments) as running:
        a_model(running, "tiny")
        yield running


def port_of(server: RunningServer) -> str:
    return server.target.rpartition(":")[2]


def refusal(channel: grpc.Channel) -> CallError:
    stub = UnslothServiceStub(channel)
    return error_of(lambda: stub.LoadModel(pb.LoadModelRequest(model_name="tiny", token=TOKEN)))


def test_from_another_host_it_is_refused_and_nothing_is_loaded(plain: RunningServer, own_address: str):
    with grpc.insecure_channel(f"{own_address}:{port_of(plain)}") as channel:
        error = refusal(channel)
        assert list(UnslothServiceStub(channel).ListModels(pb.ListModelsRequest()).models) == []
    assert (error.code, error.reason) == ("FAILED_PRECONDITION", "HUB_TOKEN_IN_PLAIN_TEXT")
    assert TOKEN not in str(error)


def test_it_is_in_no_file_of_the_server_that_refused_it(plain: RunningServer, own_address: str):
    with grpc.insecure_channel(f"{own_address}:{port_of(plain)}") as channel:
        refusal(channel)
    files = [path for path in plain.home.rglob("*") if path.is_file()] + [plain.log]
    assert "HUB_TOKEN_IN_PLAIN_TEXT" in (plain.home / "audit.jsonl").read_text()
    assert [path for path in files if TOKEN in path.read_text(errors="replace")] == []


def test_from_this_host_it_is_taken(plain: RunningServer):
    with grpc.insecure_channel(f"127.0.0.1:{port_of(plain)}") as channel:
        assert load(UnslothServiceStub(channel), "tiny", token=TOKEN).model_name == "tiny"


def test_over_tls_it_is_taken(tmp_path: Path, own_address: str):
    authority = Authority(tmp_path / "authority")
    cert, key = authority.server(hosts=(own_address,))
    arguments = (*EVERYWHERE, "--tls-cert", str(cert), "--tls-key", str(key))
    credentials = grpc.ssl_channel_credentials(authority.ca.read_bytes())
    with RunningServer(tmp_path / "server", fake_workers=True, arguments=arguments) as server:
        a_model(server, "tiny")
        with grpc.secure_channel(f"{own_address}:{port_of(server)}", credentials) as channel:
            assert load(UnslothServiceStub(channel), "tiny", token=TOKEN).model_name == "tiny"
