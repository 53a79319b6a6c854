"""Memory of the server process: at rest, with two models and a long finished training, and with 500 watchers.

The server is the real one; its workers are doubles, because what a worker holds is not the server's.
"""

import argparse
import tempfile
from pathlib import Path

import psutil
from _common import Figures, columns, options_parser, run, say
from _crowd import closed_gate, crowd, end_of, scripted_model, scripted_training, shares

from support.running_server import RunningServer
from unslothd.v1 import service_pb2 as pb
from unslothd.v1.service_pb2_grpc import UnslothServiceStub

GOAL_MB = 90.0
STEPS = 100


def parser() -> argparse.ArgumentParser:
    """The options."""
    options = options_parser(__doc__)
    options.add_argument("--events", type=int, default=10_000, help="events of the finished training")
    options.add_argument("--watchers", type=int, default=500, help="watchers of a running training")
    return options


def measure(options: argparse.Namespace) -> Figures:
    """Resident memory at each stage."""
    stages: list[Figures] = []
    with tempfile.TemporaryDirectory() as folder, RunningServer(Path(folder), fake_workers=True) as server:
        process = psutil.Process(server.process.pid)

        def look(stage: str) -> None:
            say(f"server memory: {stage}")
            full = process.memory_full_info()
            stages.append({"stage": stage, "rss_mb": round(full.rss / 1e6, 1), "private_mb": round(full.uss / 1e6, 1)})

        with server.channel() as channel:
            stub = UnslothServiceStub(channel)
            stub.GetServerInfo(pb.GetServerInfoRequest())
            look("at rest after the start")
            first, second = (scripted_model(server, stub, name) for name in ("one", "two"))
            look("2 models loaded")
            long = scripted_training(server, stub, first, "long", steps=1, flood=options.events)
            end_of(stub, long)
            look(f"a finished training of {options.events} events more")
            for turn in ("", ", a second time"):
                gate = closed_gate(server.home / f"gate{turn}")
                watched = scripted_training(server, stub, second, f"watched{turn}", steps=STEPS, gate=str(gate))
                with crowd(server.target, watched, shares(options.watchers)) as watchers:
                    look(f"{options.watchers} watchers of a running training more{turn}")
                    gate.open_all()
                    for each in watchers:
                        each.result()
                look(f"the watchers gone after {STEPS} steps{turn}")
    return {"goal_mb": GOAL_MB, "stages": stages}


def table(figures: Figures) -> str:
    """For people."""
    rows = [[stage["stage"], stage["rss_mb"], stage["private_mb"]] for stage in figures["stages"]]
    return f"Server memory (goal at rest: below {figures['goal_mb']:.0f} MB)\n" + columns(
        ["", "RSS MB", "private MB"], rows
    )


if __name__ == "__main__":
    run(measure, table, parser())
