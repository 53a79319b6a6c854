"""Writes and hashes an upload beside the event loop, a bounded number of bytes behind the network."""

import asyncio

from unslothd_server.app.dataset_store import IncomingRows
from unslothd_server.app.ports import RowCheck

# What may wait for the disk; a client that is faster is slowed down.
_MAX_WAITING_BYTES = 8 * 1024 * 1024
# After so many, what is written is brought to the disk beside what goes on, so that little is left for the end.
_FLUSH_BYTES = 32 * 1024 * 1024


class Intake:
    """Takes chunks as they come and hands them on in order, as many at once as have come meanwhile.

    Args:
        incoming: Where they go; its writes run in a thread, one at a time.
        check: Is told what is on disk.
    """

    def __init__(self, incoming: IncomingRows, check: RowCheck) -> None:
        self._incoming = incoming
        self._check = check
        self._waiting: list[bytes] = []
        self._waiting_bytes = 0
        self._writing: asyncio.Task[None] | None = None
        self._flushing: asyncio.Task[None] | None = None
        self._flushed_bytes = 0

    async def add(self, chunk: bytes) -> None:
        """Takes a chunk; waits while too much waits. Raises OSError when an earlier one could not be written."""
        self._waiting.append(chunk)
        self._waiting_bytes += len(chunk)
        if self._writing is not None and (self._writing.done() or self._waiting_bytes > _MAX_WAITING_BYTES):
            await asyncio.shield(self._writing)
            self._writing = None
        if self._writing is None:
            self._writing = asyncio.create_task(self._write())

    async def settle(self) -> None:
        """Returns once everything is written. Raises OSError."""
        for task in (self._writing, self._flushing):
            if task is not None:
                await asyncio.shield(task)

    async def close(self) -> None:
        """Returns once no thread writes any more, whether or not all went well."""
        running = [task for task in (self._writing, self._flushing) if task is not None]
        if running:
            await asyncio.wait(running)

    async def _write(self) -> None:
        while self._waiting:
            chunks, self._waiting, self._waiting_bytes = self._waiting, [], 0
            num_bytes = await asyncio.to_thread(self._incoming.write, chunks)
            self._check.grown(num_bytes)
            if num_bytes - self._flushed_bytes >= _FLUSH_BYTES:
                await self._begin_flush(num_bytes)

    async def _begin_flush(self, num_bytes: int) -> None:
        """A disk that is slower than the network slows the upload down here; an error of the last flush is raised."""
        if self._flushing is not None:
            await self._flushing
        self._flushed_bytes = num_bytes
        self._flushing = asyncio.create_task(asyncio.to_thread(self._incoming.flush))
