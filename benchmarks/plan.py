"""How long a plan takes by the number of rows, beside the bare tokenizer on the same texts, and what a probe costs.

In one process with real Unsloth on the tiny random model, so that hardly anything but rows is measured. Rows are short
(some 30 to 150 tokens). The baseline tokenises the finished texts in one call; a plan reads and renders them, finds
what is learnt, tokenises in batches, makes the trainer and lets go of it. The probe is timed as the difference of a
plan with and one without it, on the smallest number of rows.
"""

import argparse
import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from threading import Event
from typing import Any

from _common import Figures, columns, options_parser, run, say

# First: Unsloth switches protobuf to its slow implementation for whatever is imported after it.
from unslothd.v1.training_pb2 import TrainingConfig
from unslothd.worker.v1.worker_service_pb2 import PlanTrainingRequest, StartTrainingRequest

Row = dict[str, Any]
QUESTION = "What is the capital of France? I ask for the {}th time."
ANSWER = "The capital of France is Paris."
LAYOUTS: dict[str, Callable[[int], Row]] = {
    "text": lambda number: {"text": QUESTION.format(number) + " " + ANSWER},
    "prompt_completion": lambda number: {"prompt": QUESTION.format(number), "completion": " " + ANSWER},
    "chat, one answer": lambda number: {"messages": _turns(number, 1)},
    "chat, three answers": lambda number: {"messages": _turns(number, 3)},
}


def _turns(number: int, pairs: int) -> list[Row]:
    pair = [{"role": "user", "content": QUESTION.format(number)}, {"role": "assistant", "content": ANSWER}]
    return pair * pairs


def measure(options: argparse.Namespace) -> Figures:
    """Plans every layout at every size."""
    # Unsloth prints to stdout, where only the figures belong, and writes a cache into the working directory.
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        os.chdir(folder)
        return _measure(Path(folder), options.rows)


def _measure(folder: Path, sizes: list[int]) -> Figures:
    from support import engine_runs
    from support.tiny_model import build_tiny_llama
    from unslothd_server.engine.unsloth_engine import UnslothEngine

    UnslothEngine().import_libraries()
    loaded = engine_runs.load(build_tiny_llama(folder / "tiny"), folder, max_seq_length=512)
    loaded.prepare()
    _plan(loaded, [LAYOUTS["text"](0)] * 8, measure=True)
    plans: list[Figures] = []
    for name, row in LAYOUTS.items():
        for size in sizes:
            say(f"{name}, {size} rows")
            plans.append({"layout": name, "rows": size, **_timed(loaded, [row(number) for number in range(size)])})
    return {"plans": plans, "probe_seconds": _probe_seconds(loaded)}


def _timed(loaded: Any, rows: list[Row]) -> Figures:
    path = loaded.folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    begin = time.perf_counter()
    plan = _plan(loaded, path)
    seconds = time.perf_counter() - begin
    texts = [_finished_text(loaded.tokenizer, row) for row in rows]
    begin = time.perf_counter()
    loaded.tokenizer(texts, add_special_tokens=False)
    bare = time.perf_counter() - begin
    return {"tokens": plan.num_tokens, "seconds": round(seconds, 2), "bare_seconds": round(bare, 2)}


def _finished_text(tokenizer: Any, row: Row) -> str:
    if "messages" in row:
        return str(tokenizer.apply_chat_template(row["messages"], tokenize=False))
    return "".join(row.values())


def _probe_seconds(loaded: Any) -> list[float]:
    """Three times a plan with a probe less one without."""
    rows = [LAYOUTS["text"](number) for number in range(64)]
    found: list[float] = []
    for _ in range(3):
        seconds = []
        for measured in (False, True):
            begin = time.perf_counter()
            _plan(loaded, rows, measure=measured)
            seconds.append(time.perf_counter() - begin)
        found.append(round(seconds[1] - seconds[0], 2))
    return found


def _plan(loaded: Any, rows: Path | list[Row], *, measure: bool = False) -> Any:
    from support.engine_runs import as_source

    training = StartTrainingRequest(
        config=TrainingConfig(max_steps=1, warmup_steps=0),
        train_dataset=as_source(loaded.folder / "few.jsonl", rows, None),
        output_dir=str(loaded.folder / "out"),
    )
    return loaded.engine.plan(PlanTrainingRequest(training=training, measure=measure, preview_rows=3), Event())


def table(figures: Figures) -> str:
    """Rows a second of plan and bare tokenizer, and the probe's seconds."""
    rows = [
        (
            found["layout"],
            found["rows"],
            found["tokens"],
            f"{found['seconds']} s",
            f"{found['rows'] / found['seconds']:.0f}",
            f"{found['bare_seconds']} s",
        )
        for found in figures["plans"]
    ]
    head = ("layout", "rows", "tokens", "plan", "rows/s", "bare tokenizer")
    probe = ", ".join(f"{seconds} s" for seconds in figures["probe_seconds"])
    return f"{columns(head, rows)}\n\na probe more: {probe}"


if __name__ == "__main__":
    parser = options_parser(__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000], help="numbers of rows")
    run(measure, table, parser)
