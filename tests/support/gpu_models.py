"""Models for a GPU host: random weights of a true shape, made by a process that is over when they are written."""

import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path

from support import random_llama

BUILD_SECONDS = 240.0


class RandomModels:
    """Models that are made once, whatever processes of a run of the tests need them.

    Args:
        folder: Of all of them; the same for all these processes.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(exist_ok=True)

    def put(self, folder: Path, shape: str = "llama-3.2-1b") -> None:
        """Puts a random Llama where a test wants it; its files are those of the one that was made: they take no room.

        Args:
            folder: Is made.
            shape: As in random_llama.
        """
        made = self._folder / shape
        with (self._folder / f"{shape}.lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not made.exists():
                _make(self._folder / f"{shape}.partial", shape).rename(made)
        shutil.copytree(made, folder, copy_function=os.link)


def _make(folder: Path, shape: str) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    build = [sys.executable, str(Path(random_llama.__file__)), str(folder), shape]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run(build, check=True, timeout=BUILD_SECONDS, env=environment)
    return folder
