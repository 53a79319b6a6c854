"""What callers cost a training: its steps alone, and while ghz calls the server as fast as the machine can, in turn.

One real training runs all the time, on a real server with a real worker. Periods alternate: alone, under load, alone, …
The load is a mix of unary calls and of streams: the log of a training that is over, read to its end; and the running
training from its first event, left by the caller after 5 seconds. Every call must end well. A step's time is the time
between two logged steps of one period. The CPU time of a step is that of the worker process; other work on the machine
changes it less. The change is the ratio of the medians; its interval comes from 2000 bootstrap draws, of periods and
then of steps in these.

On a machine with few cores, the parts need cores of their own, or it is the scheduler that is measured:

    python benchmarks/load.py --training-cpus 0 --server-cpus 1 --client-cpus 1

On a GPU host: python benchmarks/load.py --shape llama-3.2-1b --max-seq-length 2048 --gradient-accumulation-steps 4
"""

import argparse
import json
import os
import random
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

import _ghz
import psutil
from _common import Figures, options_parser, run, say
from _ghz import Call
from _load_figures import Period, compared, table
from _made import MODEL_SECONDS, random_model

import support.calls
from support.calls import load, prepare, train, watch
from support.random_llama import SHAPES
from support.running_server import RunningServer
from unslothd.v1 import service_pb2 as pb
from unslothd.v1.dataset_pb2 import DatasetSource
from unslothd.v1.service_pb2_grpc import UnslothServiceStub
from unslothd.v1.training_pb2 import TrainingConfig

STREAM_SECONDS = 5.0
WARM_UP_STEPS = 20
ENDLESS_STEPS = 1_000_000
TEXT = "fox dog sea old man story language number answer question good morning capital of France is Paris"
# Loading a large model, and its first steps, may take longer than any call of a test.
support.calls.CALL_SECONDS = MODEL_SECONDS
CALLS = ("GetServerInfo", "ListModels", "GetModel", "ListTrainings", "GetTraining", "Watch over", "Watch running")


def parser() -> argparse.ArgumentParser:
    """The options."""
    options = options_parser(__doc__)
    options.add_argument("--ghz", type=Path, help="the program; default: what `make toolchain` builds")
    options.add_argument("--call", action="append", choices=CALLS, help="repeatable (default: all)")
    options.add_argument("--concurrency", type=int, default=8, help="calls of each kind at a time")
    options.add_argument("--rounds", type=int, default=2, help="periods under load")
    options.add_argument("--load-seconds", type=float, default=60, help="length of a period under load")
    options.add_argument("--alone-seconds", type=float, default=30, help="length of a period without")
    cpus = "cores of it, e.g. 0 or 2-5,7; default: as the system gives them"
    options.add_argument("--training-cpus", type=cores, help=f"the training's worker: {cpus}")
    options.add_argument("--server-cpus", type=cores, help=f"the server: {cpus}")
    options.add_argument("--client-cpus", type=cores, help=f"ghz: {cpus}")
    options.add_argument("--model", type=Path, help="folder of a model; default: one of random weights")
    options.add_argument("--shape", choices=SHAPES, help="of the random weights; default: 5 million parameters")
    options.add_argument("--max-seq-length", type=int, default=64, help="tokens; every row is longer and is cut")
    options.add_argument("--batch-size", type=int, default=2, help="sequences a pass")
    options.add_argument("--gradient-accumulation-steps", type=int, default=1, help="passes a step")
    options.add_argument("--load-in-4bit", action="store_true", help="4-bit weights")
    options.add_argument("--save", type=Path, help="folder for the table and the figures")
    return options


def cores(text: str) -> set[int]:
    """The numbers that a list of cores names."""
    ranges = [part.partition("-") for part in text.split(",")]
    return set(chain(*(range(int(first), int(last or first) + 1) for first, _, last in ranges)))


def measure(options: argparse.Namespace) -> Figures:
    """Runs the training and the periods."""
    ghz = _ghz.found(options.ghz)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = options.model or random_model(folder / "models" / "model", options.shape)
        arguments = ("--model-root", str(model.resolve().parent))
        # As many threads as cores: they are given after the import, when libraries have counted them.
        threads = {"OMP_NUM_THREADS": str(len(options.training_cpus))} if options.training_cpus else {}
        with RunningServer(folder, arguments=arguments, environment=threads) as server:
            figures = _measured(server, model.resolve(), ghz, folder, options)
    if options.save:
        options.save.mkdir(parents=True, exist_ok=True)
        (options.save / "load.json").write_text(json.dumps(figures, indent=1))
        (options.save / "load.txt").write_text(table(figures))
    return figures


def _measured(server: RunningServer, model: Path, ghz: str, folder: Path, options: argparse.Namespace) -> Figures:
    stub = server.stub()
    say("load: loading the model")
    loaded = load(stub, str(model), max_seq_length=options.max_seq_length, load_in_4bit=options.load_in_4bit)
    prepare(stub, loaded.model_id)
    processes = {"worker": _worker_of(server), "server": psutil.Process(server.process.pid)}
    _pin(processes["worker"], options.training_cpus)
    _pin(processes["server"], options.server_cpus)
    _pin(psutil.Process(), options.client_cpus)  # ghz inherits it
    rows = server.model_root / "rows.jsonl"
    _write_rows(rows, words=2 * options.max_seq_length)
    over = list(train(stub, loaded.model_id, _source(rows), training_config=_config(options, WARM_UP_STEPS)))
    with _endless(stub, loaded.model_id, rows, options) as running:
        calls = _calls(loaded.model_id, over[0].training_id, running, options.call or CALLS)
        periods = [_alone(processes, options.alone_seconds)]
        for number in range(1, options.rounds + 1):
            say(f"load: round {number} of {options.rounds}")
            begin, before = time.time(), _cpu(processes)
            told = _ghz.load(ghz, server.target, calls, options.load_seconds, options.concurrency, folder)
            cpu, end = _cpu_since(before, processes), time.time()
            periods.append(Period(True, begin, end, options.load_seconds, cpu, told))
            periods.append(_alone(processes, options.alone_seconds))
    events = list(watch(stub, running))
    if [event.sequence for event in events] != list(range(1, len(events) + 1)):
        raise RuntimeError("events are missing in the log of the training")
    return {"options": {key: str(value) for key, value in vars(options).items()}} | compared(events, periods)


def _worker_of(server: RunningServer) -> psutil.Process:
    children = psutil.Process(server.process.pid).children()
    return next(child for child in children if "unslothd_server.worker" in child.cmdline())


def _pin(process: psutil.Process, cpus: set[int] | None) -> None:
    """Keeps all threads of a process, and those that they will start, on these cores."""
    for thread in process.threads() if cpus else ():
        os.sched_setaffinity(thread.id, cpus)


def _write_rows(file: Path, words: int) -> None:
    draws, vocabulary = random.Random(0), TEXT.split()
    file.write_text("\n".join(json.dumps({"text": " ".join(draws.choices(vocabulary, k=words))}) for _ in range(1000)))


def _source(rows: Path) -> DatasetSource:
    return DatasetSource(path=rows.name)


def _config(options: argparse.Namespace, steps: int) -> TrainingConfig:
    return TrainingConfig(
        batch_size=options.batch_size,
        gradient_accumulation_steps=options.gradient_accumulation_steps,
        max_steps=steps,
        learning_rate=1e-5,
        lr_scheduler_type="constant",
        seed=42,
        save_steps=ENDLESS_STEPS,
    )


@contextmanager
def _endless(stub: UnslothServiceStub, model_id: str, rows: Path, options: argparse.Namespace) -> Iterator[str]:
    """A training that has made its first steps, cancelled at the end; gives its id."""
    config = _config(options, ENDLESS_STEPS)
    request = pb.TrainRequest(model_id=model_id, train_dataset=_source(rows), training_config=config)
    events = stub.Train(request)
    training_id = next(response.event.training_id for response in events if response.event.step.step == WARM_UP_STEPS)
    events.cancel()  # the training goes on
    yield training_id
    stub.CancelTraining(pb.CancelTrainingRequest(training_id=training_id))


def _calls(model_id: str, over: str, running: str, names: list[str]) -> dict[str, Call]:
    known = {
        "GetServerInfo": Call("GetServerInfo"),
        "ListModels": Call("ListModels"),
        "GetModel": Call("GetModel", {"model_id": model_id}),
        "ListTrainings": Call("ListTrainings"),
        "GetTraining": Call("GetTraining", {"training_id": running}),
        "Watch over": Call("WatchTraining", {"training_id": over}),
        "Watch running": Call("WatchTraining", {"training_id": running}, stream_seconds=STREAM_SECONDS),
    }
    return {name: known[name] for name in names}


def _alone(processes: dict[str, psutil.Process], seconds: float) -> Period:
    begin, before = time.time(), _cpu(processes)
    time.sleep(seconds)
    return Period(False, begin, time.time(), seconds, _cpu_since(before, processes), {})


def _cpu(processes: dict[str, psutil.Process]) -> dict[str, float]:
    return {name: sum(process.cpu_times()[:2]) for name, process in processes.items()}


def _cpu_since(before: dict[str, float], processes: dict[str, psutil.Process]) -> dict[str, float]:
    return {name: seconds - before[name] for name, seconds in _cpu(processes).items()}


if __name__ == "__main__":
    run(measure, table, parser())
