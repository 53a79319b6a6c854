"""Runs a program for which file modes hold, also when root runs the tests: `heeding_modes.py PROGRAM ARGUMENTS…`.

A program of its own and no `preexec_fn`: between fork and exec gRPC's fork handlers run, which now and then end it.
"""

import ctypes
import os
import sys
from collections.abc import Sequence
from pathlib import Path

_PR_CAPBSET_DROP, _CAP_DAC_OVERRIDE, _CAP_DAC_READ_SEARCH = 24, 1, 2


def heeding_modes(command: Sequence[str]) -> list[str]:
    """The command that runs a command without the right of root to read and write where modes forbid it."""
    return [sys.executable, "-S", str(Path(__file__).resolve()), *command]


if __name__ == "__main__":
    for capability in (_CAP_DAC_OVERRIDE, _CAP_DAC_READ_SEARCH):
        ctypes.CDLL(None).prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0)
    os.execv(sys.argv[1], sys.argv[1:])
