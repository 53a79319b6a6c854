"""How much longer a step of unslothd takes than the plain Unsloth script's, with the same passes: turns of a few steps.

Two processes that run the same script differ by a tenth, and so does one process from minute to minute: blocks of steps
cannot tell a difference of 1 %. Here several processes of each kind are in the middle of a training, and one at a time
runs: the others are stopped (SIGSTOP) between their turns, whose order is drawn anew in every round. The first step of
a turn does not count. Needs a GPU.

    python benchmarks/gpu_turns.py --rounds 40
"""

import argparse
import itertools
import json
import math
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from _common import HERE, Figures, columns, environment, options_parser, run, say
from _gpu_arms import ARM_SECONDS, training_config
from _made import random_model, write_rows

from support import calls, random_llama
from support.running_server import RunningServer
from unslothd.v1.dataset_pb2 import DatasetSource
from unslothd.v1.training_pb2 import TrainingConfig

MAX_SEQ_LENGTH = 2048
# More than any number of turns has; the trainings are ended by ending their processes.
STEPS = 100_000
calls.CALL_SECONDS = ARM_SECONDS * 4


@dataclass
class Runner:
    """A training under way, of which a turn is a few steps.

    Args:
        kind: "script" or "unslothd".
        pid: Of the process that trains.
        steps: Yields the time of each step once it is logged, in seconds since 1970.
        seconds: Of every counted step, a list for each turn.
        cpu: User and system seconds of the counted steps, and their page faults.
    """

    kind: str
    pid: int
    steps: Iterator[float]
    seconds: list[list[float]] = field(default_factory=list)
    cpu: list[tuple[float, float, int]] = field(default_factory=list)

    def turn(self, length: int, *, counts: bool = True) -> None:
        """Lets it run for so many steps."""
        os.kill(self.pid, signal.SIGCONT)
        at = list(itertools.islice(self.steps, 1))
        before = self._used()
        at += itertools.islice(self.steps, length - 1)
        after = self._used()
        os.kill(self.pid, signal.SIGSTOP)
        if len(at) < length:
            raise RuntimeError(f"the training of {self.kind}, process {self.pid}, ended")
        if counts:
            self.seconds.append([later - earlier for earlier, later in itertools.pairwise(at)])
            self.cpu.append(tuple(b - a for a, b in zip(before, after, strict=True)))  # type: ignore[arg-type]

    def _used(self) -> tuple[float, float, int]:
        times = psutil.Process(self.pid).cpu_times()
        faults = int(Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[7])
        return times.user, times.system, faults


Kind = Callable[..., AbstractContextManager[Runner]]


def parser() -> argparse.ArgumentParser:
    """The options."""
    options = options_parser(__doc__)
    options.add_argument("--shape", choices=random_llama.SHAPES, default="llama-3.2-1b", help="of the random weights")
    options.add_argument("--models", type=Path, help="folder that keeps the model; default: made anew each time")
    options.add_argument("--load-in-4bit", action="store_true", help="4-bit weights")
    options.add_argument("--processes", type=int, default=2, help="of each kind")
    options.add_argument("--rounds", type=int, default=40, help="turns of each process")
    options.add_argument("--turn", type=int, default=3, help="steps of a turn; the first does not count")
    options.add_argument("--warm-up", type=int, default=4, help="steps before the first turn")
    options.add_argument("--seconds", type=float, default=1e9, help="begin no further round after that many")
    return options


def measure(options: argparse.Namespace) -> Figures:
    """Starts all processes, then lets them take turns."""
    begin, drawn = time.monotonic(), random.Random(0)
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        model = random_model((options.models or folder).resolve() / options.shape, options.shape)
        rows = folder / "rows" / "full.jsonl"
        rows.parent.mkdir()
        write_rows(rows, 240, words=MAX_SEQ_LENGTH + 100)

        def start(numbered: tuple[int, Kind]) -> Runner:
            number, kind = numbered
            place = folder / f"{kind.__name__}-{number}"
            place.mkdir()
            runner = stack.enter_context(kind(model, rows, place, load_in_4bit=options.load_in_4bit))
            runner.turn(options.warm_up, counts=False)
            say(f"gpu_turns: {runner.kind} is training, {time.monotonic() - begin:.0f} s")
            return runner

        with ThreadPoolExecutor() as pool:
            runners = list(pool.map(start, itertools.product(range(options.processes), (script, service))))
        for number in range(options.rounds):
            if time.monotonic() - begin > options.seconds:
                say(f"gpu_turns: no time is left after {number} rounds")
                break
            for runner in drawn.sample(runners, len(runners)):
                runner.turn(options.turn)
            if number % 5 == 0:
                last = ", ".join(f"{each.kind} {statistics.mean(each.seconds[-1]):.4f} s" for each in runners)
                say(f"gpu_turns: round {number + 1} of {options.rounds}: {last}")
    return {
        "processes": [_figures(runner) for runner in runners],
        "unslothd_to_script": _longer(runners, "unslothd", "script"),
        "halves_of_scripts": _longer(*_halves(runners)) if options.processes > 1 else None,
    }


@contextmanager
def script(model: Path, rows: Path, folder: Path, *, load_in_4bit: bool) -> Iterator[Runner]:
    """The plain Unsloth script of gpu.py."""
    job = {
        "arm": "unsloth",
        "model": str(model),
        "load_in_4bit": load_in_4bit,
        "max_seq_length": MAX_SEQ_LENGTH,
        "tells_steps": True,
    }
    log = folder / "log"
    with log.open("wb") as stderr:
        process = subprocess.Popen(
            [sys.executable, str(HERE / "gpu_script.py"), json.dumps(job)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            cwd=folder,
            env=environment(UNSLOTH_DISABLE_STATISTICS="1", HF_HUB_OFFLINE="1"),
        )
    try:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps({"rows": str(rows), "steps": STEPS}) + "\n")
        process.stdin.flush()
        answers = (json.loads(line) for line in process.stdout)
        if "load_seconds" not in next(answers, {}):
            raise RuntimeError(f"the script ended:\n{log.read_text()[-3000:]}")
        yield Runner("script", process.pid, (answer["at"] for answer in answers))
    finally:
        process.kill()
        process.wait()


@contextmanager
def service(model: Path, rows: Path, folder: Path, *, load_in_4bit: bool) -> Iterator[Runner]:
    """A server, a model and a training with fixed passes of 2 x 4."""
    roots = ("--model-root", str(model.parent), "--model-root", str(rows.parent))
    with RunningServer(folder, arguments=roots) as server:
        stub = server.stub()
        loaded = calls.load(
            stub, str(model), max_seq_length=MAX_SEQ_LENGTH, load_in_4bit=load_in_4bit, dtype="bfloat16"
        )
        calls.prepare(stub, loaded.model_id, TrainingConfig())
        config = training_config(fixed=True)
        config.max_steps = STEPS
        events = calls.train(stub, loaded.model_id, DatasetSource(path=str(rows)), training_config=config)
        steps = (event.event_time.ToNanoseconds() / 1e9 for event in events if event.HasField("step"))
        worker = _worker_of(server)
        try:
            yield Runner("unslothd", worker.pid, steps)
        finally:
            worker.kill()
            server.kill()


def _worker_of(server: RunningServer) -> psutil.Process:
    children = psutil.Process(server.process.pid).children(recursive=True)
    return next(child for child in children if "unslothd_server.worker" in child.cmdline())


def _figures(runner: Runner) -> Figures:
    steps = list(itertools.chain.from_iterable(runner.seconds))
    user, system, faults = (sum(each) / len(steps) for each in zip(*runner.cpu, strict=True))
    return {
        "kind": runner.kind,
        "steps": len(steps),
        "mean_seconds": round(statistics.mean(steps), 4),
        "median_seconds": round(statistics.median(steps), 4),
        "user_seconds": round(user, 4),
        "system_seconds": round(system, 4),
        "page_faults": round(faults),
        "turns": [[round(each, 4) for each in turn] for turn in runner.seconds],
    }


def _longer(runners: list[Runner], one: str, other: str) -> Figures:
    """By how much a step of one kind is longer than one of the other: mean of rounds, and where 95 % of means lie."""
    kinds = {
        kind: [
            statistics.mean(itertools.chain.from_iterable(turns))
            for turns in zip(*(each.seconds for each in runners if each.kind == kind), strict=True)
        ]
        for kind in (one, other)
    }
    ratios = [math.log(a / b) for a, b in zip(kinds[one], kinds[other], strict=True)]
    mean = statistics.mean(ratios)
    around = 1.96 * statistics.stdev(ratios) / math.sqrt(len(ratios)) if len(ratios) > 1 else math.inf
    return {key: round(math.expm1(value), 4) for key, value in (("mean", mean), ("low", mean - around))} | {
        "high": round(math.expm1(mean + around), 4)
    }


def _halves(runners: list[Runner]) -> tuple[list[Runner], str, str]:
    """The scripts as two kinds: what processes of one kind differ by."""
    scripts = [each for each in runners if each.kind == "script"]
    names = ("first", "second")
    renamed = [
        Runner(names[position % 2], each.pid, each.steps, each.seconds, each.cpu)
        for position, each in enumerate(scripts)
    ]
    return renamed, "second", "first"


def table(figures: Figures) -> str:
    """For people."""
    head = ["", "steps", "mean s", "median s", "user s", "system s", "page faults"]
    keys = ("kind", "steps", "mean_seconds", "median_seconds", "user_seconds", "system_seconds", "page_faults")
    lines = [columns(head, [[each[key] for key in keys] for each in figures["processes"]])]
    for key, what in (("unslothd_to_script", "unslothd to the script"), ("halves_of_scripts", "script to script")):
        if found := figures[key]:
            low, high = 100 * found["low"], 100 * found["high"]
            lines.append(f"a step of {what}: {100 * found['mean']:+.2f} % (95 %: {low:+.2f} to {high:+.2f})")
    return "\n".join(lines)


if __name__ == "__main__":
    run(measure, table, parser())
