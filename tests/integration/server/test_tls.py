"""TLS: who cannot read along, who is taken for whom by a certificate, and renewal without a restart."""

import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import grpc
import pytest

from support.callers import info, secure_channel, token_of
from support.calls import error_of
from support.certificates import Authority
from support.running_server import RunningServer
from unslothd.v1.server_info_pb2 import Caller, Scope
from unslothd.v1.service_pb2_grpc import UnslothServiceStub

Serve = Callable[..., RunningServer]
SOON_SECONDS = 30.0  # gRPC's own bound is two minutes


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """An authority that nobody trusts."""
    return Authority(tmp_path_factory.mktemp("stranger"))


@pytest.fixture
def serve(tmp_path: Path, authority: Authority) -> Iterator[Serve]:
    """Starts a server with a certificate of the authority, in files of its own."""
    with ExitStack() as running:

        def start(*arguments: str) -> RunningServer:
            for source, target in zip(authority.server(), ("cert.pem", "key.pem"), strict=True):
                shutil.copy(source, tmp_path / target)
            tls = ("--tls-cert", str(tmp_path / "cert.pem"), "--tls-key", str(tmp_path / "key.pem"))
            return running.enter_context(RunningServer(tmp_path, fake_workers=True, arguments=(*tls, *arguments)))

        yield start


def caller(
    server: RunningServer, ca: Path, client: tuple[Path, Path] | None = None, metadata: tuple[tuple[str, str], ...] = ()
) -> Caller:
    """Whom a server takes the caller on a connection of its own for."""
    with secure_channel(server, ca, client) as channel:
        return info(UnslothServiceStub(channel), metadata).caller


def refusal(call: Callable[[], object]) -> str:
    """The reason that a call is refused with; the gRPC code when there is no connection to tell one."""
    error = error_of(call)
    return error.reason or error.code


def test_on_an_address_that_others_reach_calls_are_encrypted_and_callers_need_a_token(
    serve: Serve, authority: Authority, stranger: Authority
):
    server = serve("--listen", "0.0.0.0:0")
    assert refusal(lambda: caller(server, authority.ca)) == "TOKEN_MISSING"
    assert caller(server, authority.ca, metadata=token_of(server, "alice")).name == "alice"
    assert refusal(lambda: caller(server, stranger.ca)) == "UNAVAILABLE"
    with grpc.insecure_channel(f"127.0.0.1:{server.target.rpartition(':')[2]}") as plain:
        assert refusal(lambda: info(UnslothServiceStub(plain))) == "UNAVAILABLE"
    assert "nobody can call yet" in server.log.read_text()


def test_who_connects_and_begins_no_handshake_is_dropped(serve: Serve):
    host, _, port = serve("--keepalive-seconds", "1").target.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=SOON_SECONDS) as silent:
        assert silent.recv(1) == b""


def test_the_operator_may_let_everybody_in(serve: Serve, authority: Authority):
    server = serve("--listen", "0.0.0.0:0", "--require-identity", "no")
    assert caller(server, authority.ca).kind == Caller.KIND_ANONYMOUS


def test_a_client_certificate_says_who_calls_and_others_get_no_connection(
    serve: Serve, authority: Authority, stranger: Authority
):
    server = serve("--tls-client-ca", str(authority.ca), "--tls-client-scope", "read")
    alice = authority.client("alice")
    found = caller(server, authority.ca, alice)
    assert found == Caller(name="CN=alice", kind=Caller.KIND_CERTIFICATE, scope=Scope.SCOPE_READ)
    assert refusal(lambda: caller(server, authority.ca)) == "UNAVAILABLE"
    assert refusal(lambda: caller(server, authority.ca, stranger.client("mallory"))) == "UNAVAILABLE"


def test_a_token_tells_more_than_the_certificate_of_the_same_call(serve: Serve, authority: Authority):
    server = serve("--tls-client-ca", str(authority.ca), "--tls-client-scope", "read")
    found = caller(server, authority.ca, authority.client("alice"), token_of(server, "admin-of-alice", "admin"))
    assert found == Caller(name="admin-of-alice", kind=Caller.KIND_TOKEN, scope=Scope.SCOPE_ADMIN)


def test_a_certificate_alone_can_be_too_little(serve: Serve, authority: Authority):
    server = serve("--tls-client-ca", str(authority.ca), "--tls-client-scope", "none")
    alice = authority.client("alice")
    assert refusal(lambda: caller(server, authority.ca, alice)) == "TOKEN_MISSING"
    assert caller(server, authority.ca, alice, token_of(server, "alice")).kind == Caller.KIND_TOKEN


def test_a_renewed_certificate_is_served_to_new_connections_and_open_ones_go_on(
    serve: Serve, authority: Authority, tmp_path: Path
):
    server = serve()
    renewed = Authority(tmp_path / "renewed")
    with secure_channel(server, authority.ca) as before:
        open_stub = UnslothServiceStub(before)
        info(open_stub)
        for source, target in zip(renewed.server(), ("cert.pem", "key.pem"), strict=True):
            assert caller(server, authority.ca).name == "local"  # also while only one of the two is there
            shutil.copy(source, tmp_path / f"{target}.new").replace(tmp_path / target)
        assert caller(server, renewed.ca).name == "local"
        assert refusal(lambda: caller(server, authority.ca)) == "UNAVAILABLE"
        info(open_stub)
    assert "serving with the changed certificate" in server.log.read_text()
