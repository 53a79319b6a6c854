"""Callers of a server that asks who they are: channels with TLS, tokens, senders that fall silent."""

import queue
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

import grpc

from support.calls import CALL_SECONDS
from support.running_server import RunningServer
from unslothd.v1 import service_pb2 as pb
from unslothd.v1.server_info_pb2 import Scope
from unslothd.v1.service_pb2_grpc import UnslothServiceStub
from unslothd_server.access.tokens import TokenFile

Metadata = tuple[tuple[str, str], ...]


def secure_channel(server: RunningServer, ca: Path, client: tuple[Path, Path] | None = None) -> grpc.Channel:
    """Opens a channel with TLS and a connection of its own; close it.

    Args:
        server: Who is called, on the loopback.
        ca: Authority of the server's certificate.
        client: Certificate and key of the caller.
    """
    cert, key = (each.read_bytes() for each in client) if client else (None, None)
    credentials = grpc.ssl_channel_credentials(ca.read_bytes(), key, cert)
    target = f"127.0.0.1:{server.target.rpartition(':')[2]}"
    return grpc.secure_channel(target, credentials, options=[("grpc.use_local_subchannel_pool", 1)])


def bearer(token: str) -> Metadata:
    """Metadata that carries a token."""
    return (("authorization", f"Bearer {token}"),)


def token_of(server: RunningServer, name: str, scope: str = "train", expire_time: datetime | None = None) -> Metadata:
    """Makes a token as `unslothd tokens create` does; returns the metadata that carries it."""
    return bearer(TokenFile(server.home).create(name, Scope.Value(f"SCOPE_{scope.upper()}"), expire_time))


def info(stub: UnslothServiceStub, metadata: Metadata = ()) -> pb.GetServerInfoResponse:
    """What the server tells this caller about itself."""
    return stub.GetServerInfo(pb.GetServerInfoRequest(), metadata=metadata, timeout=CALL_SECONDS)


@contextmanager
def then_silence(*messages: object) -> Generator[Iterator[object]]:
    """A stream of requests that sends these and then nothing, until the block ends."""
    waiting: queue.Queue[object] = queue.Queue()
    for message in messages:
        waiting.put(message)
    try:
        yield iter(waiting.get, None)
    finally:
        waiting.put(None)
