"""Requests that are streamed: a sender that drips is ended; one that is fast, or that the server lets wait, is not."""

import asyncio
import dataclasses
from collections.abc import AsyncIterator

import pytest

from support.clock import Clock
from unslothd.v1.service_pb2 import UploadDatasetRequest
from unslothd_server.access.limits import CallLimits
from unslothd_server.errors import AbortedError
from unslothd_server.rpc.intake import Intake

LIMITS = CallLimits(
    max_message_bytes=1 << 20,
    max_inline_bytes=1,
    max_streams=1,
    max_requests_per_second=1.0,
    max_request_burst=1,
    max_deadline_seconds=1.0,
    upload_idle_seconds=60.0,
    min_upload_bytes_per_second=1000.0,
)
CHUNKS = 1000


def taken(chunk: bytes, *, sender_seconds: float, server_seconds: float = 0.0, limits: CallLimits = LIMITS) -> int:
    """Returns how many of CHUNKS equal chunks are taken; raises what ends the call before.

    Args:
        chunk: Of each request.
        sender_seconds: What the sender needs for each.
        server_seconds: What the server needs for each.
    """
    clock = Clock()
    data = UploadDatasetRequest(chunk=chunk).SerializeToString()

    async def requests() -> AsyncIterator[bytes]:
        for _ in range(CHUNKS):
            clock.now += sender_seconds
            yield data

    async def scenario() -> int:
        count = 0
        async for _ in Intake(limits, clock).each(requests(), UploadDatasetRequest.FromString):
            clock.now += server_seconds
            count += 1
        return count

    return asyncio.run(scenario())


def test_a_sender_that_drips_is_ended_and_told_how_fast_it_has_to_be():
    with pytest.raises(AbortedError, match=r"bytes came in 1\d\d s; the least is 1000 a second") as caught:
        taken(b"x", sender_seconds=59.0)
    assert "Make the rows first" in caught.value.message


def test_a_drip_is_looked_at_only_after_the_time_that_a_sender_may_be_silent():
    slow_start = dataclasses.replace(LIMITS, upload_idle_seconds=2.0 * CHUNKS)
    assert taken(b"x", sender_seconds=1.0, limits=slow_start) == CHUNKS


def test_a_sender_that_is_fast_enough_is_not_ended():
    assert taken(b"x" * 1100, sender_seconds=1.0) == CHUNKS


def test_the_servers_own_time_does_not_count():
    assert taken(b"x", sender_seconds=0.0, server_seconds=100.0) == CHUNKS


def test_zero_lets_uploads_be_as_slow_as_they_like():
    assert taken(b"x", sender_seconds=59.0, limits=dataclasses.replace(LIMITS, min_upload_bytes_per_second=0)) == CHUNKS
