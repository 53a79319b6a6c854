"""Saved models and adapters as users read them: by transformers and peft, in a process that never heard of Unsloth."""

import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Protocol

READ_SECONDS = 240.0
PROMPT = "The quick brown fox"


@dataclass(frozen=True)
class PlainModel:
    """What was read.

    Args:
        logits: Of the token after PROMPT, computed in float32.
        dtype: Of the stored weights.
        tied: Whether input and output embeddings are one.
        problems: Weights that were missing, and that nobody expected.
    """

    logits: list[float]
    dtype: str
    tied: bool
    problems: tuple[list[str], list[str]]


class Reader(Protocol):
    """Reads a whole model, or an adapter on its base."""

    def __call__(self, folder: Path, base: Path | None = None) -> PlainModel: ...


@contextmanager
def plain_transformers() -> Iterator[Reader]:
    """One process for many reads: its imports take longest."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:

        def reader(folder: Path, base: Path | None = None) -> PlainModel:
            return pool.submit(partial(_read, folder, base)).result(READ_SECONDS)

        yield reader


def _read(folder: Path, base: Path | None) -> PlainModel:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, info = AutoModelForCausalLM.from_pretrained(base or folder, output_loading_info=True)
    dtype = str(model.dtype)
    model = model.float()
    if base is not None:
        model = PeftModel.from_pretrained(model, folder)
    with torch.no_grad():
        logits = model.eval()(**AutoTokenizer.from_pretrained(folder)(PROMPT, return_tensors="pt")).logits[0, -1]
    assert "unsloth" not in sys.modules
    missing, unexpected = (sorted(map(str, info[key])) for key in ("missing_keys", "unexpected_keys"))
    return PlainModel(logits.tolist(), dtype, model.config.tie_word_embeddings, (missing, unexpected))
