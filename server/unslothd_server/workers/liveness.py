"""Whether a worker lives, and who belongs to it: the lock's holder, a handle on the process, its session.

Not by connecting (forked children inherit the listening socket) and not by asking for the pid (a zombie has one).
"""

import asyncio
import fcntl
import os
import signal
import struct
from contextlib import suppress
from pathlib import Path

_FLOCK = struct.Struct("hhqqi4x")  # struct flock of 64-bit Linux: type, whence, start, length, pid
_SESSION_FIELD = 3  # in /proc/<pid>/stat after the command's name: state, ppid, pgrp, session, ...


def lock_holder(path: Path) -> int | None:
    """Returns the process id of whoever holds a lock on the file; None when nobody does or there is no file."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        question = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        kind, _, _, _, pid = _FLOCK.unpack(fcntl.fcntl(descriptor, fcntl.F_GETLK, question))
    finally:
        os.close(descriptor)
    return None if kind == fcntl.F_UNLCK else pid


class ProcessHandle:
    """A handle on a process that stays right when its id is used again.

    Args:
        pid: Process id, a child or not.

    Raises:
        ProcessLookupError: There is no such process.
    """

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._descriptor = os.pidfd_open(pid)

    async def ended(self) -> None:
        """Returns once the process has ended, at once if it has. One caller at a time."""
        loop = asyncio.get_running_loop()
        end: asyncio.Future[None] = loop.create_future()
        loop.add_reader(self._descriptor, lambda: end.done() or end.set_result(None))
        try:
            await end
        finally:
            loop.remove_reader(self._descriptor)

    def send(self, number: signal.Signals) -> None:
        """Sends a signal; does nothing when the process has ended."""
        if self._descriptor >= 0:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._descriptor, number)

    def close(self) -> None:
        """Gives the handle back. Repeatable."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def session_members(session: int) -> list[int]:
    """Returns the ids of the processes of a session that still run, zombies left out."""
    return [pid for pid in _all_pids() if _runs_in(pid, session)]


async def kill_session(session: int, *, within_s: float) -> bool:
    """Kills every process of a session, those too that are being forked. Returns False if some outlived the bound."""
    deadline = asyncio.get_running_loop().time() + within_s
    while members := session_members(session):
        for pid in members:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if asyncio.get_running_loop().time() > deadline:
            return False
        await asyncio.sleep(0.01)
    return True


def _all_pids() -> list[int]:
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdecimal()]


def _runs_in(pid: int, session: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return False
    fields = stat.rpartition(")")[2].split()
    return fields[0] not in "ZX" and int(fields[_SESSION_FIELD]) == session
