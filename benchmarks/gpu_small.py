"""What the defaults do on cards with less memory: a ballast holds what they do not have of this one's.

Each model and card: a server of its own, a load, a short training of full rows with the defaults. It tells what was
chosen, how fast it is here, and the peak; or how the server refuses it. Times are those of this GPU; what fits, and in
which passes, is what another card would do. Needs a GPU.

    python benchmarks/gpu_small.py --card 8 --card 16 --card 24
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import grpc
from _common import HERE, Figures, columns, environment, options_parser, run, say
from _gpu_arms import ARM_SECONDS, MAX_SEQ_LENGTH, first_steps, training_config
from _made import random_model, write_rows

from support import calls
from support.running_server import RunningServer
from unslothd.v1.training_pb2 import TrainingConfig

GIB = 1024**3
CARDS = (8, 16, 24)
# What the driver, and a desktop, have of a card.
TAKEN_BYTES = GIB // 2
MODELS = {"1B bf16": ("llama-3.2-1b", False), "8B 4-bit": ("llama-3.1-8b", True)}
calls.CALL_SECONDS = ARM_SECONDS


def parser() -> argparse.ArgumentParser:
    """The options."""
    options = options_parser(__doc__)
    options.add_argument("--card", type=int, action="append", help=f"GiB of a card; default: {CARDS}")
    options.add_argument("--model", choices=MODELS, action="append", help="default: all")
    options.add_argument("--models", type=Path, help="folder that keeps the models; default: made anew each time")
    options.add_argument("--steps", type=int, default=8, help="of each training; the first two do not count")
    options.add_argument("--save", type=Path, help="folder for the table and the figures")
    return options


def measure(options: argparse.Namespace) -> Figures:
    """Every model on every card."""
    found: Figures = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = folder / "rows" / "rows.jsonl"
        rows.parent.mkdir()
        write_rows(rows, 240, words=MAX_SEQ_LENGTH + 100)
        for title in options.model or MODELS:
            shape, load_in_4bit = MODELS[title]
            model = random_model((options.models or folder / "models").resolve() / shape, shape)
            for card in options.card or CARDS:
                with ballast(card * GIB - TAKEN_BYTES) as free_bytes:
                    home = folder / f"{shape}-{card}"
                    home.mkdir()
                    figures = _training(home, model, rows, load_in_4bit=load_in_4bit, steps=options.steps)
                found[f"{title}, {card} GB"] = figures | {"free_gib": round(free_bytes / GIB, 2)}
                say(f"gpu_small: {title}, {card} GB: {_told(figures)}")
                # What was measured must not be lost with what was not.
                if options.save:
                    options.save.mkdir(parents=True, exist_ok=True)
                    (options.save / "gpu_small.json").write_text(json.dumps(found, indent=1))
    return found


@contextmanager
def ballast(free_bytes: int) -> Iterator[int]:
    """Leaves so many bytes of the GPU free; yields how many it really left."""
    command = [sys.executable, str(HERE / "_ballast.py"), str(free_bytes)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment()) as held:
        assert held.stdout is not None
        try:
            yield int(held.stdout.readline())
        finally:
            held.kill()


def _training(home: Path, model: Path, rows: Path, *, load_in_4bit: bool, steps: int) -> Figures:
    roots = ("--model-root", str(model.parent), "--model-root", str(rows.parent), "--warm-workers", "0")
    with RunningServer(home, arguments=roots) as server:
        stub = server.stub()
        try:
            loaded = calls.load(
                stub, str(model), max_seq_length=MAX_SEQ_LENGTH, load_in_4bit=load_in_4bit, dtype="bfloat16"
            )
            calls.prepare(stub, loaded.model_id, TrainingConfig())
            block = first_steps(stub, loaded.model_id, rows, training_config(fixed=False), steps)
        except grpc.RpcError as error:
            return {"refused": str(error.details())}
    durations = [later - earlier for earlier, later in pairwise(block["at"][1:])]
    tokens = (block["tokens"][-1] - block["tokens"][1]) / len(durations)
    return {
        "config": block["config"],
        "passes": block["passes"],
        "checkpointing": block["checkpointing"],
        "in_ram": any("RAM" in warning for warning in loaded.warnings),
        "estimate_gib": round(block["estimate_bytes"] / GIB, 2),
        "peak_gib": round(block["peak_bytes"] / GIB, 2),
        "step_seconds": round(statistics.median(durations), 4),
        "tokens_per_second": round(tokens / statistics.median(durations)),
        "last_loss": round(block["losses"][-1], 4),
    }


def _told(figures: Figures) -> str:
    if "refused" in figures:
        return f"refused: {figures['refused']}"
    return f"{_how(figures)}, {figures['tokens_per_second']} tok/s, {figures['peak_gib']} GiB"


def _how(figures: Figures) -> str:
    kept = "recomputed" if figures["checkpointing"] else "kept"
    return f"{figures['config']}, activations {kept}{', embedding in RAM' if figures['in_ram'] else ''}"


def table(figures: Figures) -> str:
    """For people."""
    head = ["", "free GiB", "passes", "tok/s here", "told GiB", "peak GiB", "loss"]
    rows = [
        [
            title,
            each["free_gib"],
            _how(each),
            each["tokens_per_second"],
            each["estimate_gib"],
            each["peak_gib"],
            each["last_loss"],
        ]
        for title, each in figures.items()
        if "refused" not in each
    ]
    refused = [f"{title}: {each['refused']}" for title, each in figures.items() if "refused" in each]
    return "\n".join([columns(head, rows), *refused])


if __name__ == "__main__":
    run(measure, table, parser())
