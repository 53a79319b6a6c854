"""A bug in the server: the caller gets the id of its call and nothing else, the log explains it."""

import asyncio
from pathlib import Path
from typing import Any, cast

import grpc.aio
import pytest
from structlog.testing import capture_logs

from support.calls import CALL_SECONDS, taken_apart
from unslothd.v1 import service_pb2 as pb
from unslothd.v1.service_pb2_grpc import UnslothServiceStub
from unslothd_server import access_setup
from unslothd_server.config import Settings
from unslothd_server.rpc.server import RpcServer


async def call_of_a_broken_server(home: Path) -> grpc.aio.AioRpcError:
    settings = Settings(home=home)
    service = cast(Any, None)  # so that each call on it raises AttributeError
    gate, limits = access_setup.gate(settings), access_setup.call_limits(settings)
    server = RpcServer(service, gate, limits, access_setup.audit_log(settings), keepalive_seconds=20)
    port = await server.start("127.0.0.1:0")
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await UnslothServiceStub(channel).GetServerInfo(pb.GetServerInfoRequest(), timeout=CALL_SECONDS)
        return caught.value
    finally:
        await server.stop(0)


def test_the_id_in_the_error_is_that_of_the_call_and_stands_beside_the_traceback_in_the_log(tmp_path: Path):
    with capture_logs() as logged:
        raised = asyncio.run(call_of_a_broken_server(tmp_path))
    error = taken_apart(raised)
    call_id = dict(raised.trailing_metadata())["unslothd-call-id"]
    assert (error.code, error.reason, error.metadata) == ("INTERNAL", "INTERNAL", {"error_id": call_id})
    assert str(call_id) in error.message
    assert "NoneType" not in error.message
    (line,) = [each for each in logged if each["event"] == "unexpected error"]
    assert line["error_id"] == call_id
    assert isinstance(line["exc_info"], AttributeError)
