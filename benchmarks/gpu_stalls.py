"""Passes that took much longer than others: what the host did in them, and what was compiled or recorded.

The engine trains in this process with its defaults. A thread looks many times a second where the trainer's thread and
those of the backward pass are. A pass lasts until the next one begins; those before the first step, which tuning runs,
are told too. TORCH_LOGS=recompiles in the environment has torch say why it compiles again.

    python benchmarks/gpu_stalls.py --shape llama-3.2-1b --mixed --steps 200
"""

import argparse
import faulthandler
import json
import os
import re
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from _common import Figures, columns, options_parser, run, say
from _made import random_model, write_rows

from support import engine_runs, random_llama
from unslothd.v1.training_event_pb2 import TrainingEvent
from unslothd.v1.training_pb2 import MICRO_BATCHING_TUNED, TrainingConfig
from unslothd_server.engine.unsloth_engine import UnslothEngine
from unslothd_server.worker.ports import StopSignal

LOOKS_PER_SECOND = 50
# Of a pass: functions that were running in so many looks are its path, of which the inner part is told.
OFTEN = 0.3
INNER = 25
# As gpu.py plans: what tuning may spend depends on how long a training is.
PLANNED_STEPS = 3000
# As faulthandler writes them.
THREAD = re.compile(r"(?:Current thread|Thread) (0x[0-9a-f]+)")
FRAME = re.compile(r'  File "(.*)", line \S+ in (.*)')
COUNTS = ("graphs compiled", "inputs recorded")


def parser() -> argparse.ArgumentParser:
    """The options."""
    options = options_parser(__doc__)
    options.add_argument("--shape", choices=random_llama.SHAPES, default="llama-3.2-1b", help="of the random weights")
    options.add_argument("--model", type=Path, help="folder of a model; default: one of random weights")
    options.add_argument("--mixed", action="store_true", help="rows of 20 to 1500 words; default: all of full length")
    options.add_argument("--max-seq-length", type=int, default=2048, help="tokens")
    options.add_argument("--steps", type=int, default=200, help="steps to train")
    options.add_argument("--trainings", type=int, default=1, help="one after another; later ones remember their passes")
    options.add_argument("--slow", type=float, default=0.5, help="seconds from which on a pass is told")
    options.add_argument("--save", type=Path, help="folder for the table and the figures")
    return options


def measure(options: argparse.Namespace) -> Figures:
    """Trains, and looks on."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # What an earlier run compiled would hide what this one waits for.
        os.environ |= {cache: str(folder / cache) for cache in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")}
        UnslothEngine().import_libraries()
        model = options.model or random_model(folder / "model", options.shape)
        rows = folder / "rows.jsonl"
        write_rows(rows, 1800, words=None if options.mixed else options.max_seq_length + 100)
        loaded = engine_runs.load(model.resolve(), folder, max_seq_length=options.max_seq_length, dtype="bfloat16")
        loaded.prepare(checkpointing=True)
        figures = {"trainings": [_trained(loaded, rows, number, options) for number in range(1, options.trainings + 1)]}
    if options.save:
        options.save.mkdir(parents=True, exist_ok=True)
        (options.save / "stalls.json").write_text(json.dumps(figures, indent=1))
        (options.save / "stalls.txt").write_text(table(figures))
    return figures


def _trained(loaded: engine_runs.Loaded, rows: Path, number: int, options: argparse.Namespace) -> Figures:
    say(f"gpu_stalls: training {number}")
    config = TrainingConfig(
        max_steps=PLANNED_STEPS, warmup_steps=2, learning_rate=2e-4, seed=42, micro_batching=MICRO_BATCHING_TUNED
    )
    onlooker = Onlooker(options.slow)

    def on_event(event: TrainingEvent, stop: StopSignal) -> None:
        onlooker.step = event.step.step if event.HasField("step") else onlooker.step
        if event.step.step == options.steps:
            stop.requested.set()

    hook = loaded.torch_model.register_forward_pre_hook(onlooker.pass_begins, with_kwargs=True)
    with onlooker:
        done = loaded.train(rows, config, name=f"training-{number}", on_event=on_event)
    hook.remove()
    passes = done.plan.passes
    return {
        "passes": f"{passes.max_tokens} tokens, {'joined' if passes.joined else 'padded'}",
        "told_step_seconds": passes.step_seconds,
        "probe_seconds": passes.probe_seconds,
        "count": onlooker.count,
        "slow": [each.figures() for each in onlooker.slow],
    }


@dataclass
class SeenPass:
    """One pass, until the next one begins.

    Args:
        step: The last step that was told when it began; 0 = before the training.
        shape: Of its input.
        begin: On this process's clock.
        counts: What torch had compiled and recorded when it began.
        looks: At its threads.
        running: How often each function was running, and the sum of its depths.
        seconds: That it took; 0 while it runs.
        done: What was compiled and recorded in it.
    """

    step: int
    shape: str
    begin: float
    counts: Counter[str]
    looks: int = 0
    running: dict[str, tuple[int, int]] = field(default_factory=dict)
    seconds: float = 0.0
    done: dict[str, int] = field(default_factory=dict)

    def look(self, frames: list[str]) -> None:
        """Notes where a thread is.

        Args:
            frames: Functions, outer ones first.
        """
        self.looks += 1
        for name, depth in {name: depth for depth, name in enumerate(frames)}.items():
            times, depths = self.running.get(name, (0, 0))
            self.running[name] = times + 1, depths + depth

    def end(self) -> None:
        """Takes its time."""
        self.seconds = time.perf_counter() - self.begin
        self.done = dict(compiled() - self.counts)

    def figures(self) -> Figures:
        """For JSON."""
        often = [(depths / times, name, times) for name, (times, depths) in self.running.items()]
        path = sorted(each for each in often if each[2] >= OFTEN * self.looks)[-INNER:]
        about = {"step": self.step, "shape": self.shape, "seconds": round(self.seconds, 3), "done": self.done}
        return about | {"path": [(name, round(times / self.looks, 2)) for _, name, times in path]}


def compiled() -> Counter[str]:
    """Graphs that torch has compiled in this process, and inputs of launches that it has recorded."""
    from torch._dynamo.utils import counters

    recorded = counters["inductor"]["cudagraph_recorded_non_static_inputs"]
    return Counter(dict(zip(COUNTS, (counters["stats"]["unique_graphs"], recorded), strict=True)))


class Onlooker:
    """Keeps the passes that took long, and where threads were in them.

    Args:
        seconds: From which on a pass is kept.
    """

    def __init__(self, seconds: float) -> None:
        self.slow: list[SeenPass] = []
        self.step = self.count = 0
        self._seconds = seconds
        self._current: SeenPass | None = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def pass_begins(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        """The last one is over."""
        self._end_last()
        shape = " x ".join(map(str, kwargs["input_ids"].shape))
        self._current = SeenPass(self.step, shape, time.perf_counter(), compiled())
        self.count += 1

    def _end_last(self) -> None:
        last, self._current = self._current, None
        if last is not None:
            last.end()
            if last.seconds >= self._seconds:
                self.slow.append(last)

    def __enter__(self) -> "Onlooker":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self._end_last()

    def _look(self) -> None:
        trainer = threading.main_thread().ident
        with tempfile.TemporaryFile("w+") as dump:
            while not self._over.wait(1 / LOOKS_PER_SECOND):
                current = self._current
                if current is None:
                    continue
                # Threads of the backward pass are torch's own, which Python's threading does not know.
                of_python = {thread.ident for thread in threading.enumerate()}
                for ident, frames in _running(dump):
                    if ident == trainer or ident not in of_python:
                        current.look(frames)


def _running(dump: TextIO) -> list[tuple[int, list[str]]]:
    """Each thread that runs Python, and its functions, outer ones first.

    sys._current_frames would keep the tensors of a function beyond its end, which fails a recording of launches.

    Args:
        dump: A file of its own, which is written over.
    """
    dump.seek(0)
    dump.truncate()
    faulthandler.dump_traceback(dump)
    dump.seek(0)
    threads: list[tuple[int, list[str]]] = []
    for line in dump:
        if thread := THREAD.match(line):
            threads.append((int(thread[1], 16), []))
        elif threads and (frame := FRAME.match(line)):
            threads[-1][1].insert(0, f"{'/'.join(Path(frame[1]).parts[-2:])} {frame[2]}")
    return threads


def table(figures: Figures) -> str:
    """For people."""
    parts: list[str] = []
    for number, training in enumerate(figures["trainings"], 1):
        about = (
            f"training {number}: {training['count']} passes, of {training['passes']}",
            f"told {training['told_step_seconds']:.3f} s a step, measured in {training['probe_seconds']:.1f} s",
            f"{len(training['slow'])} took long",
        )
        slow = training["slow"]
        rows = [(each["step"], each["shape"], each["seconds"], *map(each["done"].get, COUNTS, (0, 0))) for each in slow]
        parts += ["; ".join(about), columns(["after step", "shape", "s", *COUNTS], rows)]
        for each in slow:
            path = [f"  {share:4.0%}  {name}" for name, share in each["path"]]
            parts.append("\n".join([f"after step {each['step']}, {each['shape']}, share of looks:", *path]))
    return "\n\n".join(parts)


if __name__ == "__main__":
    run(measure, table, parser())
