"""Notices a training that hangs: it does nothing, and its worker tells nothing else."""

import asyncio
import contextlib
from typing import NoReturn

from unslothd.v1.error_reason_pb2 import ErrorReason
from unslothd_server.app.ports import Worker
from unslothd_server.app.training_run import TrainingRun
from unslothd_server.errors import AbortedError, UnslothdError

_LOOKS_A_STALL = 4  # so that a hang is noticed after at most a quarter more


async def watch_for_stall(worker: Worker, run: TrainingRun, stall_seconds: float) -> NoReturn:
    """Watches a training until it is cancelled.

    Args:
        worker: The worker that has the training.
        run: The training.
        stall_seconds: How long it may do nothing.

    Raises:
        AbortedError: It hangs (WORKER_UNRESPONSIVE).
    """
    loop = asyncio.get_running_loop()
    heard = loop.time()
    while loop.time() - heard <= stall_seconds:
        await asyncio.sleep(stall_seconds / _LOOKS_A_STALL)
        with contextlib.suppress(UnslothdError):  # a worker that does not answer may be deep in a kernel
            status = await worker.status()
            heard = loop.time() - (status.seconds_since_progress if status.training_active else 0.0)
    raise AbortedError(
        ErrorReason.ERROR_REASON_WORKER_UNRESPONSIVE,
        f"The training did nothing for {stall_seconds:g} s after step {run.training.step}, so its worker was ended. "
        "If a step or an evaluation batch really takes that long, raise the server's --stall-seconds.",
        metadata={"model_id": worker.model_id},
    )
