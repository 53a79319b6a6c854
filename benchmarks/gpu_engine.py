"""The engine without server and worker, for gpu.py: what it costs apart from what these cost. Obeys as gpu_script does.

    python gpu_engine.py '{"arm": "engine", "model": "FOLDER", "load_in_4bit": true, "max_seq_length": 2048}'

Loads the model once; then trains a block of 2 x 4 for every JSON line {"rows": FILE, "steps": N} on stdin, and prints
its figures as a JSON line. The arm "engine-waits" waits for the device after every pass, as Transformers does by itself
when it looks whether the loss is a number; the engine runs ahead of the device instead.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

START = time.time()
# stdout belongs to the answers: what libraries print goes to stderr.
ANSWERS = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)

import _common  # noqa: F401, E402 - the repository's packages
from _gpu_arms import training_config  # noqa: E402

from support import engine_runs  # noqa: E402
from unslothd.v1.training_event_pb2 import TrainingEvent  # noqa: E402
from unslothd_server.engine.passes import StepPasses  # noqa: E402
from unslothd_server.engine.unsloth_engine import UnslothEngine  # noqa: E402
from unslothd_server.worker.call_stack import with_room_for_calls  # noqa: E402
from unslothd_server.worker.ports import StopSignal  # noqa: E402


def block(loaded: engine_runs.Loaded, rows: str, steps: int) -> dict[str, Any]:
    """Trains so many steps of 2 x 4 sequences from the first row on."""
    at: list[float] = []

    def on_event(event: TrainingEvent, stop: StopSignal) -> None:
        if event.HasField("step"):
            at.append(time.time())
            if event.step.step == steps:
                stop.requested.set()

    done = loaded.train(Path(rows), training_config(fixed=True), on_event=on_event, name=f"out-{time.time()}")
    taken = done.of("step")[:steps]
    return {
        "at": at[:steps],
        "losses": [step.loss for step in taken],
        "tokens": [step.tokens for step in taken],
        "peak_bytes": max(step.peak_memory_bytes for step in taken),
    }


def wait_after_passes() -> None:
    """Makes every pass end when the device has done it."""
    import torch

    run = StepPasses.run

    def run_and_wait(*args: Any) -> Any:
        loss = run(*args)
        torch.cuda.synchronize()
        return loss

    StepPasses.run = run_and_wait


def answer(figures: dict[str, Any]) -> None:
    """One line on the real stdout."""
    ANSWERS.write(json.dumps(figures) + "\n")
    ANSWERS.flush()


def main() -> None:
    """Loads, then obeys stdin."""
    job = json.loads(sys.argv[1])
    UnslothEngine().import_libraries()
    if job["arm"] == "engine-waits":
        wait_after_passes()
    begin = time.time()
    options = {key: job[key] for key in ("load_in_4bit", "max_seq_length")}
    loaded = engine_runs.load(Path(job["model"]), Path.cwd() / "engine", dtype="bfloat16", **options)
    loaded.prepare(checkpointing=True)
    answer({"load_seconds": time.time() - begin, "start_to_loaded_seconds": time.time() - START})
    for line in sys.stdin:
        asked = json.loads(line)
        answer(block(loaded, asked["rows"], asked["steps"]))


if __name__ == "__main__":
    # As on the main thread of a worker.
    with_room_for_calls(main)
