"""What a process does before it touches a secret or a file: closed to others, no core dumps, and so are its files."""

import ctypes
import os
import resource

_PR_SET_DUMPABLE = 4


def harden_process() -> None:
    """Hardens this process and all that it starts.

    A core dump would hold tokens, prompts and rows; and whatever a library writes, under whatever umask the operator's
    shell has, is for the server's user alone.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.umask(0o077)


def close_to_debuggers() -> None:
    """From now on only root reads this process's memory and environment; what it starts is as open as ever.

    Other processes of its user could otherwise, and so could a handler of core dumps that the kernel pipes to.

    Raises:
        OSError: The kernel refuses.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_DUMPABLE) failed")
