"""The stop ladder: ask, insist, kill. Every rung is bounded, and none is skipped because the one before it failed."""

import asyncio
import logging
import signal
from collections.abc import Awaitable, Callable
from typing import Any

from unslothd_server.errors import UnslothdError
from unslothd_server.workers.liveness import ProcessHandle, kill_session
from unslothd_server.workers.timeouts import WorkerTimeouts

_log = logging.getLogger(__name__)


async def stop_process(
    process: ProcessHandle,
    ended: asyncio.Future[Any],
    ask: Callable[[], Awaitable[None]],
    timeouts: WorkerTimeouts,
) -> None:
    """Ends a worker process; returns once it has ended, or when even SIGKILL did not end it in time.

    Args:
        process: The worker, leader of its session.
        ended: Done once the process is gone.
        ask: Sends the Shutdown call; may raise UnslothdError.
        timeouts: Bound of every rung.
    """
    try:
        await ask()
    except UnslothdError as error:
        _log.warning("worker process %d did not take Shutdown: %s", process.pid, error.message)
    else:
        if await _ends_within(ended, timeouts.end_in_order):
            return
    if ended.done():
        return
    _log.warning("worker process %d is still there: SIGTERM", process.pid)
    process.send(signal.SIGTERM)
    if await _ends_within(ended, timeouts.end_on_sigterm):
        return
    _log.warning("worker process %d is still there: SIGKILL", process.pid)
    await kill_process(process, ended, timeouts)


async def kill_process(process: ProcessHandle, ended: asyncio.Future[Any], timeouts: WorkerTimeouts) -> None:
    """Ends a worker process without asking; returns once it has ended, or when it did not in time."""
    process.send(signal.SIGKILL)
    await kill_session(process.pid, within_s=timeouts.end_on_sigkill)
    if not await _ends_within(ended, timeouts.end_on_sigkill):
        _log.error("worker process %d does not end by SIGKILL; a driver holds it", process.pid)


async def _ends_within(ended: asyncio.Future[Any], seconds: float) -> bool:
    await asyncio.wait([ended], timeout=seconds)
    return ended.done()
