"""What reliability costs: steps beside stopped watchers, the replay of a long log, and a restart with workers to adopt.

Everything but the engine is real. Steps: a scripted training makes a step every 1 / RATE seconds while a crowd watches,
half of it stopped (SIGSTOP, on connections of its own); sizes in turn, in rounds. Replay: one watcher reads a finished
training of EVENTS events from the first, through a bare stub and through the Python client, in turn. Restart: from the
spawn of a server, whose predecessor was killed, until it serves, which is when every living worker is taken over.
"""

import argparse
import os
import signal
import statistics
import tempfile
import time
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path

from _common import Figures, columns, options_parser, percentile, run, say, spread
from _crowd import closed_gate, crowd, end_of, scripted_model, scripted_training, shares

import unslothd
from support.calls import CALL_SECONDS, watch
from support.running_server import RunningServer
from support.stopped_watchers import stopped_watchers
from unslothd.v1 import service_pb2 as pb
from unslothd.v1.service_pb2_grpc import UnslothServiceStub


def parser() -> argparse.ArgumentParser:
    """The options."""
    options = options_parser(__doc__)
    options.add_argument("--watchers", type=int, nargs="+", default=[0, 100, 500], help="sizes of the crowd")
    options.add_argument("--steps", type=int, default=50, help="steps a size and round")
    options.add_argument("--rate", type=float, default=5.0, help="steps a second")
    options.add_argument("--events", type=int, default=100_000, help="events of the log that is replayed")
    options.add_argument("--models", type=int, nargs="+", default=[0, 1, 4, 8], help="workers to take over")
    options.add_argument("--rounds", type=int, default=3, help="of everything")
    return options


def measure(options: argparse.Namespace) -> Figures:
    """All three parts."""
    with (
        tempfile.TemporaryDirectory() as folder,
        RunningServer(Path(folder), fake_workers=True) as server,
        server.channel() as channel,
    ):
        stub = UnslothServiceStub(channel)
        model_id = scripted_model(server, stub, "scripted")
        steps = _measure_steps(server, stub, model_id, options)
        replay = _measure_replay(server, stub, model_id, options)
    return {"steps": steps, "replay": replay, "restart": [_measure_restart(count, options) for count in options.models]}


# --- steps ---


def _measure_steps(
    server: RunningServer, stub: UnslothServiceStub, model_id: str, options: argparse.Namespace
) -> list[Figures]:
    seconds: dict[int, list[float]] = {size: [] for size in options.watchers}
    for number in range(options.rounds):
        for size in options.watchers:
            say(f"steps: round {number + 1}, {size} watchers")
            seconds[size] += _step_seconds(server, stub, model_id, f"{number}-{size}", size, options)
    return [
        {"watchers": size, "steps": len(found), "step_ms": spread([1000 * each for each in found])}
        for size, found in seconds.items()
    ]


def _step_seconds(
    server: RunningServer, stub: UnslothServiceStub, model_id: str, name: str, size: int, options: argparse.Namespace
) -> list[float]:
    gate = closed_gate(server.home / f"gate-{name}")
    period = 1 / options.rate
    training_id = scripted_training(
        server, stub, model_id, f"rows-{name}", steps=options.steps, step_seconds=period, gate=str(gate)
    )
    with ExitStack() as stack:
        if size:
            stopped = stack.enter_context(stopped_watchers(server.target, training_id, size // 2))
            os.kill(stopped.pid, signal.SIGSTOP)
            stack.enter_context(crowd(server.target, training_id, shares(size - size // 2)))
        gate.open_all()
        end_of(stub, training_id)
    times = [event.event_time.ToNanoseconds() / 1e9 for event in watch(stub, training_id) if event.HasField("step")]
    return [after - before for before, after in pairwise(times)]


# --- replay ---


def _measure_replay(
    server: RunningServer, stub: UnslothServiceStub, model_id: str, options: argparse.Namespace
) -> Figures:
    say(f"replay: a log of {options.events} events")
    training_id = scripted_training(server, stub, model_id, "long", steps=options.events)
    end_of(stub, training_id)
    rates: dict[str, list[float]] = {"bare stub": [], "bare stub, 200 a response": [], "Python client": []}
    with unslothd.Client(server.target) as client:
        for _ in range(options.rounds):
            for arm, found in rates.items():
                began = time.monotonic()
                if arm == "bare stub":
                    count = sum(1 for _ in stub.WatchTraining(pb.WatchTrainingRequest(training_id=training_id)))
                elif arm.startswith("bare stub"):
                    request = pb.WatchTrainingRequest(training_id=training_id, max_events=200)
                    count = sum(len(response.events) for response in stub.WatchTraining(request))
                else:
                    count = sum(1 for _ in client.watch(training_id))
                found.append(count / (time.monotonic() - began))
                assert count > options.events
    return {arm: {"median": round(statistics.median(found)), "max": round(max(found))} for arm, found in rates.items()}


# --- restart ---


def _measure_restart(count: int, options: argparse.Namespace) -> Figures:
    say(f"restart: {count} workers")
    seconds: list[float] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        server = RunningServer(folder, fake_workers=True)
        for number in range(count):
            scripted_model(server, server.stub(), f"m{number}")
        for _ in range(options.rounds):
            server.kill()
            if server.process.stdout is not None:
                server.process.stdout.close()
            began = time.monotonic()
            server = RunningServer(folder, fake_workers=True)
            seconds.append(time.monotonic() - began)
            models = server.stub().ListModels(pb.ListModelsRequest(), timeout=CALL_SECONDS).models
            assert len(models) == count
        server.__exit__(None, None, None)
    return {"workers": count, "seconds": {"median": round(percentile(seconds, 50), 2), "max": round(max(seconds), 2)}}


def table(figures: Figures) -> str:
    """For people."""
    steps = [
        [each["watchers"], each["steps"], *(each["step_ms"][name] for name in ("median", "p95", "p99", "max"))]
        for each in figures["steps"]
    ]
    replay = [[arm, each["median"], each["max"]] for arm, each in figures["replay"].items()]
    restart = [[each["workers"], each["seconds"]["median"], each["seconds"]["max"]] for each in figures["restart"]]
    return "\n\n".join(
        (
            "Steps\n" + columns(["watchers, half stopped", "steps", "median ms", "p95", "p99", "max"], steps),
            "Replay to one watcher\n" + columns(["through", "events/s, median", "best"], replay),
            "Server start to all workers taken over\n" + columns(["workers", "median s", "max s"], restart),
        )
    )


if __name__ == "__main__":
    run(measure, table, parser())
