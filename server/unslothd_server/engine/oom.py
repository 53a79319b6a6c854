"""Running out of memory or disk, in the many forms in which libraries say it."""

from unslothd.v1.error_reason_pb2 import ErrorReason
from unslothd_server.engine.disk_faults import library_says, says_full
from unslothd_server.errors import ExhaustedError

MEMORY_TEXTS = ("CUDA out of memory", "DefaultCPUAllocator: can't allocate memory", "not enough memory")


def exhausted(error: BaseException, remedy: str) -> ExhaustedError | None:
    """The error of ours for running out of memory or disk; None when it is something else.

    Args:
        error: As raised.
        remedy: What helps against a lack of memory, as the end of "To mend it, …".
    """
    import torch

    text = str(error)
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or library_says(error, MEMORY_TEXTS):
        return ExhaustedError(
            ErrorReason.ERROR_REASON_OUT_OF_MEMORY,
            f"The device ran out of memory ({text.splitlines()[0] if text else type(error).__name__}). "
            f"To mend it, {remedy}.",
        )
    if says_full(error):
        return ExhaustedError(
            ErrorReason.ERROR_REASON_DISK_FULL,
            f"The disk is full ({text}). Free space, or keep fewer checkpoints with save_total_limit, and try again.",
        )
    return None
