"""What GPU benchmarks train: models of random weights, and rows of random words."""

import json
import random
import subprocess
import sys
from pathlib import Path

from _common import HERE, environment, say

from support.tiny_model import EOS

MODEL_SECONDS = 900
WORDS = ["fox", "dog", "sea", "old", "man", "story", "language", "number", "answer", "question"]


def random_model(model: Path, shape: str | None = None) -> Path:
    """Makes a model where there is none, in a process of its own; returns its folder.

    Args:
        model: The folder.
        shape: As in random_llama; default: 5 million parameters.
    """
    if not model.exists():
        say(f"making {shape or 'a small model'}")
        command = [sys.executable, str(HERE / "_random_model.py"), str(model), *([shape] if shape else [])]
        subprocess.run(command, env=environment(), timeout=MODEL_SECONDS, check=True, capture_output=True)
    return model


def write_rows(file: Path, count: int, *, words: int | None = None) -> None:
    """Writes rows, the same for the same arguments.

    Each ends with the end-of-sequence token of these models: TRL and unslothd would add it, Unsloth alone does not.

    Args:
        file: JSON lines.
        count: Rows.
        words: Of every row; None = 20 to 1500, mean 239.
    """
    drawn = random.Random(0)
    lengths = [words or min(1500, max(20, int(drawn.lognormvariate(5.2, 0.75)))) for _ in range(count)]
    texts = [" ".join(drawn.choices(WORDS, k=length)) + EOS for length in lengths]
    file.write_text("\n".join(json.dumps({"text": text}) for text in texts))
