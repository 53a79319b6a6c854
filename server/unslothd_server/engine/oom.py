"""Running out of memory or disk, in the many forms in which libraries say it."""

import errno

from unslothd.v1.error_reason_pb2 import ErrorReason
from unslothd_server.errors import ExhaustedError

MEMORY_TEXTS = ("CUDA out of memory", "DefaultCPUAllocator: can't allocate memory", "not enough memory")
DISK_TEXTS = ("No space left on device", "Disk quota exceeded", "PytorchStreamWriter failed writing")


def exhausted(error: BaseException, remedy: str) -> ExhaustedError | None:
    """The error of ours for running out of memory or disk; None when it is something else.

    Args:
        error: As raised.
        remedy: What helps against a lack of memory, as the end of "To mend it, …".
    """
    import torch

    text = str(error)
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or _says(error, MEMORY_TEXTS):
        return ExhaustedError(
            ErrorReason.ERROR_REASON_OUT_OF_MEMORY,
            f"The device ran out of memory ({text.splitlines()[0] if text else type(error).__name__}). "
            f"To mend it, {remedy}.",
        )
    if (isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)) or _says(error, DISK_TEXTS):
        return ExhaustedError(
            ErrorReason.ERROR_REASON_DISK_FULL,
            f"The disk is full ({text}). Free space, or keep fewer checkpoints with save_total_limit, and try again.",
        )
    return None


def _says(error: BaseException, texts: tuple[str, ...]) -> bool:
    # A plain OSError or ValueError may quote such a text from a file; only the libraries' own errors count.
    return (isinstance(error, RuntimeError) or type(error).__name__ == "SafetensorError") and any(
        text in str(error) for text in texts
    )
