"""How much longer a step of the engine takes than the plain Unsloth script's, by two trainers in one process.

Processes that run the same script differ by several percent, and turns of several processes (gpu_turns.py) cannot tell
1 %. Here one process holds two models, one in the hands of the engine, the other in those of the script, both with
passes of 2 x 4. They train in turns of a few steps, each on a thread of its own while the other one waits; the first
step of a turn does not count. What a worker costs beside its engine, events on their way to the log, is left out.

    python benchmarks/gpu_pairs.py --rounds 40
"""

import argparse
import itertools
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from _common import Figures, columns, longer, longer_line, options_parser, run, say
from _gpu_arms import training_config
from _made import random_model, write_rows
from _script_trainer import script_trainer

from support import engine_runs, random_llama
from unslothd.v1.training_event_pb2 import TrainingEvent
from unslothd_server.engine.unsloth_engine import UnslothEngine
from unslothd_server.worker.call_stack import with_room_for_calls
from unslothd_server.worker.ports import StopSignal

ARMS = ("script", "engine")
STEPS = 100_000
SHORTEST_TURN = 2
# Of one turn of the other arm, its compiling and its preparation of rows included.
LONGEST_TURN_SECONDS = 300.0


@dataclass
class Turns:
    """Lets one arm train at a time.

    Args:
        length: Steps of a turn; the first does not count.
        rounds: Turns of each arm, after one that does not count.
        until: No further round begins after that, by time.monotonic(); one is always counted.
        seconds: Mean of the counted steps of each turn, by arm; the same of user and system time of the process.
    """

    length: int
    rounds: int
    until: float
    seconds: dict[str, list[float]] = field(default_factory=lambda: {arm: [] for arm in ARMS})
    cpu_seconds: dict[str, list[float]] = field(default_factory=lambda: {arm: [] for arm in ARMS})
    over: bool = False
    _may_train: dict[str, threading.Semaphore] = field(
        default_factory=lambda: {arm: threading.Semaphore(0) for arm in ARMS}
    )
    _at: list[float] = field(default_factory=list)
    _cpu: list[float] = field(default_factory=list)
    _warmed_up: set[str] = field(default_factory=set)

    def begin(self) -> None:
        """Gives the first arm its turn."""
        self._may_train[ARMS[0]].release()

    def wait(self, arm: str) -> None:
        """Returns when it is the arm's turn, or when there are no more."""
        if not self._may_train[arm].acquire(timeout=LONGEST_TURN_SECONDS):
            self.over = True
            raise TimeoutError(f"gpu_pairs: {arm} did not get its turn in {LONGEST_TURN_SECONDS:.0f} s")

    def step_done(self, arm: str) -> bool:
        """Notes a step, gives the turn away after the last one of a turn; True when there are no more."""
        self._at.append(time.perf_counter())
        times = psutil.Process().cpu_times()
        self._cpu.append(times.user + times.system)
        if len(self._at) == self.length and not self.over:
            _wait_for_device()
            self._note(arm)
            self._at.clear()
            self._cpu.clear()
            other = ARMS[1 - ARMS.index(arm)]
            counted = len(self.seconds[ARMS[1]])
            if arm == ARMS[1] and (counted >= self.rounds or (counted and time.monotonic() > self.until)):
                self.over = True
            self._may_train[other].release()
            if not self.over:
                self.wait(arm)
        return self.over

    def leave(self, arm: str) -> None:
        """An arm ends, whatever its reason: the other one waits no longer."""
        self.over = True
        self._may_train[ARMS[1 - ARMS.index(arm)]].release()

    def _note(self, arm: str) -> None:
        if arm not in self._warmed_up:
            self._warmed_up.add(arm)
            return
        counted = self.length - 1
        self.seconds[arm].append((self._at[-1] - self._at[0]) / counted)
        self.cpu_seconds[arm].append((self._cpu[-1] - self._cpu[0]) / counted)
        number = len(self.seconds[arm])
        if arm == ARMS[1] and number % 5 == 1:
            last = ", ".join(f"{each} {self.seconds[each][-1]:.4f} s" for each in ARMS)
            say(f"gpu_pairs: round {number} of {self.rounds}: {last}")


def parser() -> argparse.ArgumentParser:
    """The options."""
    options = options_parser(__doc__)
    options.add_argument("--shape", choices=random_llama.SHAPES, default="llama-3.2-1b", help="of the random weights")
    options.add_argument("--model", type=Path, help="folder of a model; default: one of random weights")
    options.add_argument("--load-in-4bit", action="store_true", help="4-bit weights")
    options.add_argument("--max-seq-length", type=int, default=2048, help="tokens; all rows have as many")
    options.add_argument("--rounds", type=int, default=40, help="turns of each trainer")
    options.add_argument("--turn", type=int, default=4, help="steps of a turn; the first does not count")
    options.add_argument("--seconds", type=float, default=1e9, help="begin no further round after that many")
    return options


def measure(options: argparse.Namespace) -> Figures:
    """Loads both models, then lets the trainers take turns."""
    if options.turn < SHORTEST_TURN or options.rounds < 1:
        raise SystemExit(f"gpu_pairs: --turn is {SHORTEST_TURN} at least, --rounds is 1 at least")
    until = time.monotonic() + options.seconds
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = (options.model or random_model(folder / "model", options.shape)).resolve()
        rows = folder / "rows.jsonl"
        write_rows(rows, 240, words=options.max_seq_length + 100)
        os.chdir(folder)  # where Unsloth puts what it compiles
        try:
            turns = Turns(options.turn, options.rounds, until)
            _train_both(model, rows, folder, options, turns)
        finally:
            os.chdir(before)
    return {
        "arms": {arm: _summary(turns, arm) for arm in ARMS},
        "engine_to_script": _engine_to_script(turns.seconds),
        "engine_to_script_cpu": _engine_to_script(turns.cpu_seconds),
    }


def _train_both(model: Path, rows: Path, folder: Path, options: argparse.Namespace, turns: Turns) -> None:
    UnslothEngine().import_libraries()

    def load(arm: str) -> engine_runs.Loaded:
        (folder / arm).mkdir()
        loaded = engine_runs.load(
            model,
            folder / arm,
            load_in_4bit=options.load_in_4bit,
            max_seq_length=options.max_seq_length,
            dtype="bfloat16" if _on_gpu() else "float32",
        )
        loaded.prepare(checkpointing=True)
        return loaded

    works: dict[str, Callable[[engine_runs.Loaded], None]] = {
        "script": lambda loaded: _script(loaded, rows, options.max_seq_length, turns),
        "engine": lambda loaded: _engine(loaded, rows, turns),
    }
    errors: list[BaseException] = []

    def train(arm: str, loaded: engine_runs.Loaded) -> None:
        try:
            turns.wait(arm)
            with_room_for_calls(lambda: works[arm](loaded))
        except BaseException as error:  # noqa: BLE001 - raised again on the main thread
            errors.append(error)
        finally:
            turns.leave(arm)

    threads = [threading.Thread(target=train, args=(arm, load(arm)), name=arm) for arm in ARMS]
    for thread in threads:
        thread.start()
    turns.begin()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def _script(loaded: engine_runs.Loaded, rows: Path, max_seq_length: int, turns: Turns) -> None:
    from transformers import TrainerCallback

    class TakesTurns(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
            """Once a step, as logging_steps is 1."""
            if logs and "loss" in logs and turns.step_done("script"):
                control.should_training_stop = True

    trainer = script_trainer(
        loaded.torch_model,
        loaded.tokenizer,
        str(rows),
        max_seq_length=max_seq_length,
        steps=STEPS,
        callbacks=[TakesTurns()],
    )
    trainer.train()


def _engine(loaded: engine_runs.Loaded, rows: Path, turns: Turns) -> None:
    config = training_config(fixed=True)
    config.max_steps = STEPS

    def on_event(event: TrainingEvent, stop: StopSignal) -> None:
        if event.HasField("step") and turns.step_done("engine"):
            stop.requested.set()

    loaded.train(rows, config, on_event=on_event)


def _on_gpu() -> bool:
    import torch

    return bool(torch.cuda.is_available())


def _wait_for_device() -> None:
    """Nothing of one arm runs in the turn of the other."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _summary(turns: Turns, arm: str) -> Figures:
    seconds, cpu = turns.seconds[arm], turns.cpu_seconds[arm]
    return {
        "steps": len(seconds) * (turns.length - 1),
        "mean_seconds": round(statistics.mean(seconds), 4),
        "median_seconds": round(statistics.median(seconds), 4),
        "cpu_seconds": round(statistics.mean(cpu), 4),
        "turns": [round(each, 4) for each in seconds],
    }


def _engine_to_script(seconds: dict[str, list[float]]) -> Figures:
    script, engine = (seconds[arm] for arm in ARMS)
    # Each turn of the engine lies between two of the script: what changes slowly on the machine is in both.
    between = [(one + other) / 2 for one, other in itertools.pairwise(script)]
    return longer(engine[: len(between)], between) if between else longer(engine, script)


def table(figures: Figures) -> str:
    """For people."""
    head = ["", "steps", "mean s", "median s", "CPU s"]
    keys = ("steps", "mean_seconds", "median_seconds", "cpu_seconds")
    lines = [columns(head, [[arm, *(each[key] for key in keys)] for arm, each in figures["arms"].items()])]
    for key, what in {"engine_to_script": "a step", "engine_to_script_cpu": "the CPU time of a step"}.items():
        lines.append(longer_line(f"{what} of the engine to the script's", figures[key]))
    return "\n".join(lines)


if __name__ == "__main__":
    run(measure, table, parser())
