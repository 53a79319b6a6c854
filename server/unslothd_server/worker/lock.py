"""The lock that says that a worker lives: a POSIX record lock, which the kernel drops with the process.

It is not inherited by forked children, so nothing that a worker leaves behind can look like the worker.
"""

import fcntl
import os
from pathlib import Path

# Closing any descriptor of the file would drop the lock: nothing else in a worker may open it, and this one stays open.
_held: list[int] = []


def take_lock(path: Path) -> bool:
    """Takes the lock until the process ends. Returns False when another process holds it."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return False
    _held.append(descriptor)
    return True
