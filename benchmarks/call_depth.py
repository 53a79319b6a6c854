"""What it costs to train where Python's call stack ends at a chunk of memory, and what a worker's room for calls saves.

A small model trains a few steps at a time, called from ever more frames, with and without the room in turn. CPU seconds
and page faults are those of the thread that trains, for a step. Needs no GPU.

    python benchmarks/call_depth.py
"""

import argparse
import os
import resource
import statistics
import sys
import tempfile
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

from _common import Figures, columns, options_parser, run, say
from _made import random_model

from support import engine_runs
from unslothd.v1.training_event_pb2 import TrainingEvent
from unslothd.v1.training_pb2 import TrainingConfig
from unslothd_server.engine.unsloth_engine import UnslothEngine
from unslothd_server.worker.call_stack import with_room_for_calls
from unslothd_server.worker.ports import StopSignal

STEPS = 4
COUNTED = 2
# So many faults a step are the stack's: without them it has a handful.
FAULTS_OF_THE_STACK = 200
# malloc gives memory back between passes too, which is not what is looked for.
MALLOC_KEEPS = {
    "MALLOC_TRIM_THRESHOLD_": "1000000000",
    "MALLOC_TOP_PAD_": "67108864",
    "MALLOC_MMAP_THRESHOLD_": "33554432",
}


def parser() -> argparse.ArgumentParser:
    """The options."""
    options = options_parser(__doc__)
    options.add_argument("--depths", type=int, default=36, help="most frames that are added")
    options.add_argument("--every", type=int, default=3, help="frames from one depth to the next")
    return options


def measure(options: argparse.Namespace) -> Figures:
    """Trains at every depth, without and with the room."""
    found: list[Figures] = []
    # What libraries print goes to stderr.
    with tempfile.TemporaryDirectory() as name, redirect_stdout(sys.stderr):
        os.chdir(name)
        UnslothEngine().import_libraries()
        model = random_model(Path(name) / "model")
        loaded = engine_runs.load(model, Path(name), load_in_4bit=False, max_seq_length=64)
        loaded.prepare(checkpointing=True)
        _trained(loaded, "warm-up")
        for depth in range(0, options.depths + 1, options.every):
            without = _at_depth(depth, partial(_trained, loaded, f"without-{depth}"))
            room = with_room_for_calls(partial(_at_depth, depth, partial(_trained, loaded, f"room-{depth}")))
            found.append({"depth": depth, "without": without, "room": room})
            faults = f"{without['page_faults']} page faults a step, with room {room['page_faults']}"
            say(f"call_depth: {depth} frames more, {faults}")
    return {"depths": found}


def _at_depth(depth: int, work: Callable[[], Any]) -> Any:
    return _at_depth(depth - 1, work) if depth else work()


def _trained(loaded: engine_runs.Loaded, name: str) -> Figures:
    used: list[tuple[int, float]] = []

    def on_event(event: TrainingEvent, stop: StopSignal) -> None:
        if event.HasField("step"):
            now = resource.getrusage(resource.RUSAGE_THREAD)
            used.append((now.ru_minflt, now.ru_utime + now.ru_stime))

    config = TrainingConfig(max_steps=STEPS, warmup_steps=0, batch_size=2, gradient_accumulation_steps=4)
    loaded.train([{"text": "a story of the old man and the sea"}] * 8 * STEPS, config, on_event=on_event, name=name)
    (faults, seconds), (last_faults, last_seconds) = used[-1 - COUNTED], used[-1]
    return {
        "page_faults": round((last_faults - faults) / COUNTED),
        "cpu_seconds": round((last_seconds - seconds) / COUNTED, 4),
    }


def table(figures: Figures) -> str:
    """For people."""
    depths = figures["depths"]
    head = ["frames", "page faults", "CPU s", "with room: page faults", "CPU s"]
    rows = [[each["depth"], *each["without"].values(), *each["room"].values()] for each in depths]
    lines = [columns(head, rows)]
    hit = [each for each in depths if each["without"]["page_faults"] >= FAULTS_OF_THE_STACK]
    if hit:
        longer = statistics.median(each["without"]["cpu_seconds"] / each["room"]["cpu_seconds"] - 1 for each in hit)
        lines.append(f"where calls map memory, a step takes {100 * longer:+.1f} % CPU time (median of those depths)")
    return "\n".join(lines)


if __name__ == "__main__":
    if not MALLOC_KEEPS.keys() <= os.environ.keys():
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **MALLOC_KEEPS})
    run(measure, table, parser())
