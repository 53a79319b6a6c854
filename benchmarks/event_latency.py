"""Latency of a step's event from the worker to the client's receipt, for 1, 50 and 500 watchers of one training.

Everything but the engine is real: worker process, private socket, server, TCP on the loopback, gRPC clients in other
processes, each watcher on a connection of its own. The worker double makes an event every 1 / RATE seconds. Its
event_time and the client's time of arrival are of the same clock.
"""

import argparse
import tempfile
from pathlib import Path

import psutil
from _common import Figures, columns, options_parser, percentile, run, say, spread
from _crowd import closed_gate, crowd, end_of, scripted_model, scripted_training, shares

from support.running_server import RunningServer
from unslothd.v1.service_pb2_grpc import UnslothServiceStub


def parser() -> argparse.ArgumentParser:
    """The options."""
    options = options_parser(__doc__)
    options.add_argument("--watchers", type=int, nargs="+", default=[1, 50, 500], help="sizes of the crowd")
    options.add_argument("--events", type=int, default=100, help="step events a size")
    options.add_argument("--rate", type=float, default=5.0, help="events a second")
    return options


def measure(options: argparse.Namespace) -> Figures:
    """Figures for every size of the crowd."""
    with (
        tempfile.TemporaryDirectory() as folder,
        RunningServer(Path(folder), fake_workers=True) as server,
        server.channel() as channel,
    ):
        stub = UnslothServiceStub(channel)
        model_id = scripted_model(server, stub, "scripted")
        sizes = [_measure_size(server, stub, model_id, size, options) for size in options.watchers]
    return {"events": options.events, "rate": options.rate, "sizes": sizes}


def _measure_size(
    server: RunningServer, stub: UnslothServiceStub, model_id: str, size: int, options: argparse.Namespace
) -> Figures:
    say(f"event latency: {size} watchers, {options.events} events at {options.rate} a second")
    gate = closed_gate(server.home / f"gate-{size}")
    training_id = scripted_training(
        server, stub, model_id, f"rows-{size}", steps=options.events, step_seconds=1 / options.rate, gate=str(gate)
    )
    service = psutil.Process(server.process.pid)
    (worker,) = service.children()
    with crowd(server.target, training_id, shares(size)) as processes:
        before = {"server": _cpu(service), "worker": _cpu(worker)}
        gate.open_all()
        results = [process.result() for process in processes]
        cpu = {"server": _cpu(service) - before["server"], "worker": _cpu(worker) - before["worker"]}
    end_of(stub, training_id)
    cpu["clients"] = sum(result["cpu_seconds"] for result in results)
    latencies = [latency for result in results for latency in result["latencies_ms"]]
    assert len(latencies) == size * options.events
    return {
        "watchers": size,
        "latency_ms": spread(latencies),
        # One watcher in a process of its own waits for no other client's work: these two show the server's part.
        "first_attached_ms": spread(results[0]["latencies_ms"]),
        "last_attached_ms": spread(results[-1]["latencies_ms"]),
        "worker": _pace(results[0]["event_times"], 1 / options.rate),
        "cpu_ms_per_event": {name: round(1000 * seconds / options.events, 2) for name, seconds in cpu.items()},
    }


def _cpu(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


def _pace(times: list[float], period: float) -> Figures:
    """The rate that the worker kept, and how late it was for a step beside its schedule."""
    late = [1000 * (at - times[0] - index * period) for index, at in enumerate(times)]
    return {
        "rate": round((len(times) - 1) / (times[-1] - times[0]), 3),
        "late_ms_median": round(percentile(late, 50), 2),
        "late_ms_p95": round(percentile(late, 95), 2),
    }


def table(figures: Figures) -> str:
    """For people."""
    head = ["watchers", "median ms", "p95", "p99", "first: median", "last: median", "events/s", "late p95 ms"]
    head += [f"{name} CPU ms/event" for name in ("worker", "server", "clients")]
    rows = []
    for size in figures["sizes"]:
        all_ms, worker, cpu = size["latency_ms"], size["worker"], size["cpu_ms_per_event"]
        row = [size["watchers"], all_ms["median"], all_ms["p95"], all_ms["p99"]]
        row += [size["first_attached_ms"]["median"], size["last_attached_ms"]["median"]]
        rows.append([*row, worker["rate"], worker["late_ms_p95"], cpu["worker"], cpu["server"], cpu["clients"]])
    return f"Event latency, worker to client ({figures['events']} events at {figures['rate']}/s)\n" + columns(
        head, rows
    )


if __name__ == "__main__":
    run(measure, table, parser())
