"""What LoadModel costs with and without a warm worker, beside from_pretrained in a bare script after its import.

Arms run in turn: a bare script in a fresh process; LoadModel with no worker that stands ready; LoadModel with one. One
load before all of them fills the page cache. A load is timed from the call to the answer that carries the model.

On a GPU host: python benchmarks/load_model.py --model FOLDER --load-in-4bit
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
from _common import HERE, Figures, bare_arm, columns, environment, options_parser, run, say

from support.calls import CALL_SECONDS, load
from support.running_server import RunningServer
from unslothd.v1 import service_pb2 as pb
from unslothd.v1.service_pb2_grpc import UnslothServiceStub

ARM_SECONDS = 900
GOAL_SECONDS = 1.0


def parser() -> argparse.ArgumentParser:
    """The options."""
    options = options_parser(__doc__)
    options.add_argument(
        "--model", type=Path, help="folder of a model; default: a random Llama of 5 million parameters"
    )
    options.add_argument("--rounds", type=int, default=3, help="loads of each arm")
    options.add_argument("--max-seq-length", type=int, default=2048, help="tokens")
    options.add_argument("--load-in-4bit", action="store_true", help="4-bit weights")
    return options


def measure(options: argparse.Namespace) -> Figures:
    """Runs the arms in turn."""
    arms: dict[str, list[float]] = {"import": [], "bare": [], "cold": [], "warm": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = _model(folder, options)
        _bare(folder, model, options)
        for number in range(1, options.rounds + 1):
            say(f"load model: round {number} of {options.rounds}")
            bare = _bare(folder, model, options)
            arms["import"].append(bare["import"])
            arms["bare"].append(bare["load"])
            with _server(folder, model, spares=0) as server:
                arms["cold"].append(_load(server.stub(), model, options))
            with _server(folder, model, spares=1) as server:
                stub = server.stub()
                free = _free_gpu_bytes(stub)
                _wait_warm(stub)
                spare = _spare(server) | {"gpu_mb": round((free - _free_gpu_bytes(stub)) / 1e6)}
                arms["warm"].append(_load(stub, model, options))
    return {"options": {key: str(value) for key, value in vars(options).items()}, "seconds": arms, "spare": spare}


def _model(folder: Path, options: argparse.Namespace) -> Path:
    if options.model:
        return options.model.resolve()
    model = folder / "models" / "model"
    command = [sys.executable, str(HERE / "_random_model.py"), str(model)]
    subprocess.run(command, env=environment(), timeout=ARM_SECONDS, check=True, capture_output=True)
    return model


def _bare(folder: Path, model: Path, options: argparse.Namespace) -> dict[str, float]:
    job = {"model": str(model), "max_seq_length": options.max_seq_length, "load_in_4bit": options.load_in_4bit}
    return bare_arm("_bare_load.py", job, folder, ARM_SECONDS)


def _server(folder: Path, model: Path, *, spares: int) -> RunningServer:
    return RunningServer(folder, arguments=("--model-root", str(model.parent), "--warm-workers", str(spares)))


def _load(stub: UnslothServiceStub, model: Path, options: argparse.Namespace) -> float:
    began = time.monotonic()
    loaded = load(stub, str(model), max_seq_length=options.max_seq_length, load_in_4bit=options.load_in_4bit or None)
    seconds = time.monotonic() - began
    stub.UnloadModel(pb.UnloadModelRequest(model_id=loaded.model_id), timeout=CALL_SECONDS)
    return seconds


def _wait_warm(stub: UnslothServiceStub) -> None:
    end = time.monotonic() + ARM_SECONDS
    while not stub.GetServerInfo(pb.GetServerInfoRequest(), timeout=CALL_SECONDS).warm_workers:
        if time.monotonic() > end:
            raise TimeoutError("no spare worker became ready")
        time.sleep(0.1)


def _spare(server: RunningServer) -> Figures:
    """What a spare holds of the host's memory, in MB."""
    (spare,) = psutil.Process(server.process.pid).children()
    memory = spare.memory_full_info()
    return {"rss_mb": round(memory.rss / 1e6), "private_mb": round(memory.uss / 1e6)}


def _free_gpu_bytes(stub: UnslothServiceStub) -> int:
    """Free memory of all GPUs; nobody else may use them meanwhile."""
    devices = stub.GetServerInfo(pb.GetServerInfoRequest(), timeout=CALL_SECONDS).devices
    return sum(device.free_memory_bytes for device in devices if device.device != "cpu")


def table(figures: Figures) -> str:
    """For people."""
    names = {
        "import": "bare script: import unsloth",
        "bare": "bare script: from_pretrained",
        "cold": "LoadModel, no worker stands ready",
        "warm": "LoadModel, a warm worker",
    }
    seconds = figures["seconds"]
    rows = [
        [name, f"{statistics.median(seconds[arm]):.2f}", ", ".join(f"{each:.2f}" for each in seconds[arm])]
        for arm, name in names.items()
    ]
    beyond = statistics.median(seconds["warm"]) - statistics.median(seconds["bare"])
    spare = figures["spare"]
    return "\n".join(
        [
            "LoadModel, cold and warm",
            columns(["", "median s", "all"], rows),
            f"warm beyond from_pretrained: {beyond:+.2f} s (goal: at most {GOAL_SECONDS:.0f} s)",
            f"a spare holds {spare['rss_mb']} MB ({spare['private_mb']} MB of its own), {spare['gpu_mb']} MB on a GPU",
        ]
    )


if __name__ == "__main__":
    run(measure, table, parser())
