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

    Everyone reads the same folder, which nobody changes. A hard link of its files, made while somebody loads them,
    would: it gives them a new time of change, and a model whose files change while they are read is refused.

    Args:
        root: The folder of all of them; the same for all these processes.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        root.mkdir(exist_ok=True)

    def made(self, shape: str = "llama-3.2-1b") -> Path:
        """Returns the folder of a random Llama: the one of that name in the root. Do not write to it.

        Args:
            shape: As in random_llama.
        """
        folder = self.root / shape
        with (self.root / f"{shape}.lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not folder.exists():
                _make(self.root / f"{shape}.partial", shape).rename(folder)
        return folder


def _make(folder: Path, shape: str) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    build = [sys.executable, str(Path(random_llama.__file__)), str(folder), shape]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run(build, check=True, timeout=BUILD_SECONDS, env=environment)
    return folder
