"""Bytes on the port that are no HTTP/2, or a hostile kind of it: the server stays, serves others, keeps nothing."""

import contextlib
import os
import socket
import struct
import time
from collections.abc import Iterator
from random import Random

import grpc
import psutil
import pytest

from support.running_server import RunningServer
from support.waiting import wait_until
from unslothd.v1 import service_pb2 as pb
from unslothd.v1.service_pb2_grpc import UnslothServiceStub

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
CONNECTIONS = int(os.environ.get("UNSLOTHD_TEST_RAW_CONNECTIONS", "600"))
ANSWER_SECONDS = 10.0
_DATA, _HEADERS, _PRIORITY, _RST, _SETTINGS, _PUSH, _PING, _GOAWAY, _WINDOW, _CONTINUATION = range(10)


def frame(kind: int, payload: bytes = b"", *, flags: int = 0, stream: int = 0, length: int | None = None) -> bytes:
    """An HTTP/2 frame, whose length may be a lie."""
    size = len(payload) if length is None else length
    return struct.pack(">I", size)[1:] + bytes((kind, flags)) + struct.pack(">I", stream) + payload


def header_bomb() -> bytes:
    """HPACK: one long header goes into the table, then is named thousands of times, a byte each."""
    entry = b"\x40\x01x\x7f\x80\x1e" + b"y" * 3967
    return frame(_HEADERS, entry + b"\xbe" * 12_000, flags=0x4, stream=1)


def header_flood() -> bytes:
    """Headers that go on and on and never end."""
    return frame(_HEADERS, b"\x82", stream=1) + frame(_CONTINUATION, b"\x82" * 1000, stream=1) * 200


HOSTILE = {
    "nothing": lambda random: b"",
    "noise": lambda random: random.randbytes(random.randint(1, 2000)),
    "half a preface": lambda random: PREFACE[: random.randint(1, len(PREFACE) - 1)],
    "HTTP/1.1": lambda random: b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "TLS": lambda random: b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + random.randbytes(508),
    "noise after the preface": lambda random: PREFACE + random.randbytes(random.randint(9, 2000)),
    "any frame": lambda random: (
        PREFACE
        + frame(_SETTINGS)
        + b"".join(
            frame(random.randrange(12), random.randbytes(random.randint(0, 40)), flags=random.randrange(256), stream=n)
            for n in range(6)
        )
    ),
    "a frame of 16 MiB": lambda random: PREFACE + frame(_SETTINGS) + frame(_DATA, b"x", stream=1, length=0xFFFFFF),
    "header bomb": lambda random: PREFACE + frame(_SETTINGS) + header_bomb(),
    "header flood": lambda random: PREFACE + frame(_SETTINGS) + header_flood(),
    "a thousand resets": lambda random: (
        PREFACE
        + frame(_SETTINGS)
        + b"".join(
            frame(_HEADERS, b"\x82\x86\x84", flags=0x4, stream=n) + frame(_RST, b"\0\0\0\x08", stream=n)
            for n in range(1, 2001, 2)
        )
    ),
    "pings": lambda random: PREFACE + frame(_SETTINGS) + frame(_PING, b"12345678") * 500,
    "settings": lambda random: PREFACE + frame(_SETTINGS, b"\x00\x04\x7f\xff\xff\xff") * 500,
    "a window of nothing": lambda random: PREFACE + frame(_SETTINGS, b"\x00\x04\0\0\0\0") + frame(_WINDOW, b"\0" * 4),
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    with RunningServer(tmp_path_factory.mktemp("raw"), fake_workers=True) as running:
        yield running


def connect(server: RunningServer) -> socket.socket:
    host, _, port = server.target.rpartition(":")
    return socket.create_connection((host, int(port)), timeout=ANSWER_SECONDS)


def send(server: RunningServer, data: bytes) -> None:
    """Sends, takes what comes at once, and goes away: what the server does with it is the server's affair."""
    with contextlib.suppress(OSError), connect(server) as connection:
        connection.sendall(data)
        connection.settimeout(0.005)
        connection.recv(65536)


def answer_seconds(server: RunningServer) -> float:
    """How long another caller waits for an answer, over a connection of its own."""
    began = time.monotonic()
    with grpc.insecure_channel(server.target) as channel:
        UnslothServiceStub(channel).ListModels(pb.ListModelsRequest(), timeout=ANSWER_SECONDS)
    return time.monotonic() - began


@pytest.mark.parametrize("kind", HOSTILE)
def test_others_are_served_while_hostile_bytes_come(kind: str, server: RunningServer):
    random = Random(kind)
    for _ in range(5):
        send(server, HOSTILE[kind](random))
        assert answer_seconds(server) < ANSWER_SECONDS
    assert server.process.poll() is None


def test_memory_and_open_files_are_as_before_after_many_hostile_connections(server: RunningServer):
    random = Random(1)
    process = psutil.Process(server.process.pid)
    kinds = list(HOSTILE.values())
    for number in range(CONNECTIONS // 3):
        send(server, kinds[number % len(kinds)](random))
    memory, files = process.memory_info().rss, process.num_fds()
    for number in range(CONNECTIONS):
        send(server, kinds[number % len(kinds)](random))
    answer_seconds(server)
    wait_until(lambda: process.num_fds() <= files + 5)
    assert process.memory_info().rss < memory + 16 * 1024 * 1024


def test_connections_that_send_a_byte_now_and_then_keep_nobody_out(server: RunningServer):
    slow = [connect(server) for _ in range(100)]
    try:
        for place in range(len(PREFACE)):
            for connection in slow:
                with contextlib.suppress(OSError):
                    connection.sendall(PREFACE[place : place + 1])
            if place % 8 == 0:
                assert answer_seconds(server) < ANSWER_SECONDS
    finally:
        for connection in slow:
            connection.close()
    process = psutil.Process(server.process.pid)
    wait_until(lambda: process.num_fds() < 60)
