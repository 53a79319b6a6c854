"""How a worker process ended, in figures and in words."""

from dataclasses import dataclass

from unslothd.v1.error_reason_pb2 import ErrorReason
from unslothd_server.errors import AbortedError

_LIKELY_CAUSES = {
    "SIGKILL": "mostly the kernel's out-of-memory killer, or somebody's kill -9",
    "SIGSEGV": "a crash in native code",
    "SIGBUS": "mostly a full /dev/shm or a file that was cut while mapped",
    "SIGABRT": "native code gave up, often CUDA or an assertion",
}


@dataclass(frozen=True)
class WorkerExit:
    """How a worker process ended.

    Args:
        exit_code: Exit code; None when a signal ended it, or when nobody can know.
        signal: Name of the signal that ended it, e.g. "SIGKILL"; None when none did.
        log_tail: Last lines of its log.
        asked: True when we ended it ourselves.
    """

    exit_code: int | None
    signal: str | None
    log_tail: str
    asked: bool


class WorkerStuckError(AbortedError):
    """Not even SIGKILL ended a worker (WORKER_UNRESPONSIVE). It does nothing any more, but holds what it had.

    Args:
        model_id: Its model.
        pid: Its process.
    """

    def __init__(self, model_id: str, pid: int) -> None:
        super().__init__(
            ErrorReason.ERROR_REASON_WORKER_UNRESPONSIVE,
            f'The worker of model "{model_id}", process {pid}, does not end, not even by SIGKILL: a driver or a disk '
            "holds it in the kernel, and with it the memory of its device. Until it is gone the model cannot be loaded "
            "again; the kernel's log (dmesg) tells more, and a restart of the host ends it.",
            metadata={"model_id": model_id, "pid": str(pid)},
        )


def worker_died(model_id: str, end: WorkerExit) -> AbortedError:
    """Returns the error of every call on a worker that is gone."""
    metadata = {"model_id": model_id}
    if end.exit_code is not None:
        metadata["exit_code"] = str(end.exit_code)
    if end.signal is not None:
        metadata["signal"] = end.signal
    text = f'The worker process of model "{model_id}" {_how(end)}. Unload the model and load it again.'
    if end.log_tail:
        text += f" Last lines of its log:\n{end.log_tail}"
    return AbortedError(ErrorReason.ERROR_REASON_WORKER_DIED, text, metadata=metadata)


def _how(end: WorkerExit) -> str:
    if end.asked:
        return "was ended on request"
    if end.signal is not None:
        cause = _LIKELY_CAUSES.get(end.signal)
        return f"was ended by {end.signal}" + (f" ({cause})" if cause else "")
    if end.exit_code is not None:
        return f"ended by itself with exit code {end.exit_code}"
    return "is gone; nobody saw how it ended"
