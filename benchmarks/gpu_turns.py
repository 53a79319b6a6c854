"""How much longer a step of unslothd takes than the plain Unsloth script's, with the same passes: turns of a few steps.

Two processes that run the same script differ by a tenth, and so does one process from minute to minute: blocks of steps
cannot tell a difference of 1 %. Here several processes of each kind are in the middle of a training, and one at a time
runs: the others are stopped (SIGSTOP) between their turns, whose order is drawn anew in every round. The first step of
a turn does not count. Needs a GPU.

    python benchmarks/gpu_turns.py --rounds 40
"""

import argparse
import itertools
import os
import random
import signal
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from _common import Figures, columns, longer, longer_line, options_parser, run, say
from _gpu_arms import ARM_SECONDS, MAX_SEQ_LENGTH, Case, Script, training_config
from _made import random_model, write_rows

from support import calls, random_llama
from support.running_server import RunningServer
from unslothd.v1.dataset_pb2 import DatasetSource
from unslothd.v1.training_pb2 import TrainingConfig

# More than any number of turns has; the trainings are ended by ending their processes.
STEPS = 100_000
SHORTEST_TURN = 2
calls.CALL_SECONDS = ARM_SECONDS * 4


@dataclass
class Runner:
    """A training under way, of which a turn is a few steps.

    Args:
        kind: "script" or "unslothd".
        pid: Of the process that trains.
        steps: Yields the time of each step once it is logged, in seconds since 1970.
        seconds: Of every counted step, a list for each turn.
        used: User seconds, system seconds and page faults of the counted steps, a list for each turn.
    """

    kind: str
    pid: int
    steps: Iterator[float]
    seconds: list[list[float]] = field(default_factory=list)
    used: list[list[float]] = field(default_factory=list)

    def turn(self, length: int, *, counts: bool = True) -> None:
        """Lets it run for so many steps; RuntimeError when its training ends."""
        os.kill(self.pid, signal.SIGCONT)
        at = [self._step()]
        before = self._used()
        at += [self._step() for _ in range(length - 1)]
        after = self._used()
        os.kill(self.pid, signal.SIGSTOP)
        if counts:
            self.seconds.append([later - earlier for earlier, later in itertools.pairwise(at)])
            self.used.append([late - early for early, late in zip(before, after, strict=True)])

    def _step(self) -> float:
        at = next(self.steps, None)
        if at is None:
            raise RuntimeError(f"the training of {self.kind}, process {self.pid}, ended")
        return at

    def _used(self) -> tuple[float, float, int]:
        times = psutil.Process(self.pid).cpu_times()
        # The eighth field after the name, which may have spaces; psutil does not tell it.
        faults = int(Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[7])
        return times.user, times.system, faults


Kind = Callable[[Case, Path, Path, Path], AbstractContextManager[Runner]]


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
    if options.turn < SHORTEST_TURN or options.rounds < 1 or options.processes < 1:
        raise SystemExit(f"gpu_turns: --turn is {SHORTEST_TURN} at least, --rounds and --processes are 1 at least")
    begin, drawn = time.monotonic(), random.Random(0)
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        case = Case(options.shape, options.load_in_4bit, mixed=False, steps={})
        model = random_model((options.models or folder).resolve() / options.shape, options.shape)
        rows = folder / "rows" / "full.jsonl"
        rows.parent.mkdir()
        write_rows(rows, 240, words=MAX_SEQ_LENGTH + 100)

        def start(numbered: tuple[int, Kind]) -> Runner:
            number, kind = numbered
            place = folder / f"{kind.__name__}-{number}"
            place.mkdir()
            runner = stack.enter_context(kind(case, model, rows, place))
            runner.turn(options.warm_up, counts=False)
            say(f"gpu_turns: {runner.kind} is training, {time.monotonic() - begin:.0f} s")
            return runner

        with ThreadPoolExecutor() as pool:
            runners = list(pool.map(start, itertools.product(range(options.processes), (script, service))))
        for number in range(options.rounds):
            if number and time.monotonic() - begin > options.seconds:
                say(f"gpu_turns: no time is left after {number} rounds")
                break
            for runner in drawn.sample(runners, len(runners)):
                runner.turn(options.turn)
            if number % 5 == 0:
                last = ", ".join(f"{each.kind} {statistics.mean(each.seconds[-1]):.4f} s" for each in runners)
                say(f"gpu_turns: round {number + 1} of {options.rounds}: {last}")
    scripts, services = ([each for each in runners if each.kind == kind] for kind in ("script", "unslothd"))
    return {
        "processes": [_figures(runner) for runner in runners],
        "unslothd_to_script": longer(_means(services), _means(scripts)),
        # What processes of one kind differ by.
        "script_to_script": longer(_means(scripts[1::2]), _means(scripts[::2])) if len(scripts) > 1 else None,
    }


@contextmanager
def script(case: Case, model: Path, rows: Path, folder: Path) -> Iterator[Runner]:
    """The plain Unsloth script of gpu.py."""
    process = Script("unsloth", case, model, folder, tells_steps=True)
    try:
        process.answer()  # it has loaded the model
        process.ask(rows, STEPS)
        yield Runner("script", process.process.pid, (process.answer()["at"] for _ in itertools.count()))
    finally:
        process.kill()


@contextmanager
def service(case: Case, model: Path, rows: Path, folder: Path) -> Iterator[Runner]:
    """A server, a model and a training with fixed passes of 2 x 4."""
    roots = ("--model-root", str(model.parent), "--model-root", str(rows.parent))
    with RunningServer(folder, arguments=roots) as server:
        stub = server.stub()
        loaded = calls.load(
            stub, str(model), max_seq_length=MAX_SEQ_LENGTH, load_in_4bit=case.load_in_4bit, dtype="bfloat16"
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
    user, system, faults = (sum(each) / len(steps) for each in zip(*runner.used, strict=True))
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


def _means(runners: list[Runner]) -> list[float]:
    """Seconds of a step in each round, over all of them."""
    rounds = zip(*(runner.seconds for runner in runners), strict=True)
    return [statistics.mean(itertools.chain.from_iterable(turns)) for turns in rounds]


def table(figures: Figures) -> str:
    """For people."""
    head = ["", "steps", "mean s", "median s", "user s", "system s", "page faults"]
    keys = ("kind", "steps", "mean_seconds", "median_seconds", "user_seconds", "system_seconds", "page_faults")
    lines = [columns(head, [[each[key] for key in keys] for each in figures["processes"]])]
    pairs = {"unslothd_to_script": "unslothd to the script", "script_to_script": "one script to another"}
    for key, what in pairs.items():
        if found := figures[key]:
            lines.append(longer_line(f"a step of {what}", found))
    return "\n".join(lines)


if __name__ == "__main__":
    run(measure, table, parser())
