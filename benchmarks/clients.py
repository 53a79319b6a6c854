"""Events a second, and the wait for the first, of the clients in Python, Go and TypeScript against one server.

Each client, in a process of its own (the adapters of tests/conformance), reads the whole log of one finished training
of scripted workers, several times: the events come as fast as server and client can. A round begins with a new call on
an open connection; the first round of each process, which opens it and warms a JIT up, is told apart.
"""

import argparse
import statistics
import tempfile
from pathlib import Path

from _common import Figures, columns, options_parser, run, say
from _crowd import end_of, scripted_model, scripted_training

from conformance.adapter_process import AdapterProcess
from conformance.languages import LANGUAGES
from support.running_server import RunningServer
from unslothd.v1.service_pb2_grpc import UnslothServiceStub


def parser() -> argparse.ArgumentParser:
    """The options."""
    options = options_parser(__doc__)
    options.add_argument("--events", type=int, default=20_000, help="warning events in the log")
    options.add_argument("--rounds", type=int, default=5, help="readings of the log that count")
    options.add_argument("--clients", nargs="+", choices=sorted(LANGUAGES), default=list(LANGUAGES))
    return options


def measure(options: argparse.Namespace) -> Figures:
    """Figures for every client."""
    with (
        tempfile.TemporaryDirectory() as name,
        RunningServer(Path(name), fake_workers=True) as server,
        server.channel() as channel,
    ):
        stub = UnslothServiceStub(channel)
        model_id = scripted_model(server, stub, "scripted")
        training_id = scripted_training(server, stub, model_id, "rows", steps=1, flood=options.events)
        end_of(stub, training_id)
        return {
            client: _measure_client(client, server.target, training_id, options.rounds, Path(name))
            for client in options.clients
        }


def _measure_client(client: str, target: str, training_id: str, rounds: int, folder: Path) -> Figures:
    say(f"clients: {client}")
    LANGUAGES[client].built()
    with AdapterProcess(LANGUAGES[client], {"target": target}, folder / f"{client}.log") as adapter:
        results: list[Figures] = []
        for _ in range(rounds + 1):
            adapter.send({"call": "timed_watch", "training_id": training_id})
            results.append(adapter.hear()["result"])
    cold, *warm = results
    return {
        "events": cold["events"],
        "events_per_second": round(statistics.median(each["events"] / each["seconds"] for each in warm)),
        "first_event_ms": round(1000 * statistics.median(each["first_event_seconds"] for each in warm), 2),
        "first_event_of_a_new_connection_ms": round(1000 * cold["first_event_seconds"], 2),
    }


def table(figures: Figures) -> str:
    """One line a client."""
    head = ["client", "events", "events/s", "first event ms", "with the connection ms"]
    return columns(head, [[client, *each.values()] for client, each in figures.items()])


if __name__ == "__main__":
    run(measure, table, parser())
