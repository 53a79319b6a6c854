"""A TCP proxy that treats connections badly: it cuts each after a while, delays every byte, or falls silent."""

import asyncio
import contextlib
import socket
import struct
import threading
from collections.abc import Coroutine
from types import TracebackType
from typing import Any, Self

_CHUNK_BYTES = 1 << 16
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)  # SO_LINGER of 0 s: close sends RST, as a router that forgot a connection


class FlakyProxy:
    """Listens on `target`, a free port of the loopback, and passes on to a server; in a thread of its own.

    Args:
        server: HOST:PORT.
        cut_after_s: Age at which every connection is reset; None = never.
        delay_s: For every chunk, in both directions.
    """

    def __init__(self, server: str, *, cut_after_s: float | None = None, delay_s: float = 0.0) -> None:
        host, _, port = server.rpartition(":")
        self._server = (host, int(port))
        self._cut_after_s = cut_after_s
        self._delay_s = delay_s
        self.connections = 0
        self._open: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="flaky proxy", daemon=True)
        self._thread.start()
        listener = self._call(asyncio.start_server(self._serve, "127.0.0.1", 0))
        self.target = f"127.0.0.1:{listener.sockets[0].getsockname()[1]}"
        self._listener = listener

    def fall_silent(self) -> None:
        """From now on the open connections pass nothing on, and nobody is told: half-open. New ones are passed on."""
        self._call(self._fall_silent())

    async def _fall_silent(self) -> None:
        for task in self._tasks:
            task.cancel()

    def _call(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(30)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            to_reader, to_writer = await asyncio.open_connection(*self._server)
        except OSError:  # the server is away
            writer.close()
            return
        ends = (writer, to_writer)
        self._open.update(ends)
        if self._cut_after_s is not None:
            self._loop.call_later(self._cut_after_s, self._cut, ends)
        for source, sink in ((reader, to_writer), (to_reader, writer)):
            task = asyncio.create_task(self._pass_on(source, sink, ends))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _pass_on(
        self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, ends: tuple[asyncio.StreamWriter, ...]
    ) -> None:
        with contextlib.suppress(OSError):
            while chunk := await source.read(_CHUNK_BYTES):
                await asyncio.sleep(self._delay_s)
                sink.write(chunk)
                await sink.drain()
        self._cut(ends)

    def _cut(self, ends: tuple[asyncio.StreamWriter, ...]) -> None:
        for end in ends:
            self._open.discard(end)
            with contextlib.suppress(OSError):
                end.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
            end.transport.abort()

    async def _close(self) -> None:
        self._listener.close()
        for task in self._tasks:
            task.cancel()
        self._cut(tuple(self._open))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._call(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(30)
        self._loop.close()
