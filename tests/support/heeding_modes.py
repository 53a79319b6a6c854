"""Runs a program as other users can, also when root runs the tests: `heeding_modes.py PROGRAM ARGUMENTS…`.

File modes hold for it, and of other processes it sees what every process of its user sees.

A program of its own and no `preexec_fn`: between fork and exec gRPC's fork handlers run, which now and then end it.
"""

import ctypes
import os
import sys
from collections.abc import Sequence
from pathlib import Path

_PR_CAPBSET_DROP = 24
_OVER_FILES = (1, 2)  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
_OVER_PROCESSES = (19, 21, 38)  # CAP_SYS_PTRACE, CAP_SYS_ADMIN, CAP_PERFMON


def heeding_modes(command: Sequence[str]) -> list[str]:
    """The command that runs a command without the rights of root over other users' files and over processes."""
    return [sys.executable, "-S", str(Path(__file__).resolve()), *command]


if __name__ == "__main__":
    for capability in (*_OVER_FILES, *_OVER_PROCESSES):
        ctypes.CDLL(None).prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0)
    os.execv(sys.argv[1], sys.argv[1:])
