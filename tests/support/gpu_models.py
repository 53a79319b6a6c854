"""Models for a GPU host: random weights of a true shape, made by a process that is over when they are written."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from support import random_llama

BUILD_SECONDS = 240.0


# The first of each shape that this process made.
_made: dict[str, Path] = {}


def make_model(folder: Path, shape: str = "llama-3.2-1b") -> None:
    """Writes a random Llama, or the files of the one that was written before once more: they take no more room.

    Args:
        folder: Is made.
        shape: As in random_llama.
    """
    if shape in _made:
        shutil.copytree(_made[shape], folder, copy_function=os.link)
        return
    build = [sys.executable, str(Path(random_llama.__file__)), str(folder), shape]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run(build, check=True, timeout=BUILD_SECONDS, env=environment)
    _made[shape] = folder
