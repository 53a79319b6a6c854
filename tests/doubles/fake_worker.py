"""A worker process without torch: the real worker code around a scripted engine. For fast tests of the server.

Start it through the launcher: `LocalLauncher(home, command=fake_worker_command(), ...)`, then talk to it as to a real
worker. Without any knob it loads at once, prepares, trains `config.max_steps` steps (3 when unset) with loss 2/step,
saves a checkpoint every save_steps and one at the end, an evaluation every eval_steps, writes checkpoint-N/ and final/.

Knobs of the process, arguments of `fake_worker_command`:
    import_gate     path: the "import" ends once this file exists (the socket is open before)
    ignore_sigterm  SIGTERM and Shutdown do nothing: only SIGKILL ends it
    model           the knobs of the model as a dict, for when the source is no folder

Knobs of the model, a JSON object in the file `fake.json` of the folder that is loaded:
    load, prepare   misbehaviour (below) in that call
    load_gate       path: loading ends once this file exists
    export          misbehaviour in an export, when the first of its two files is written
    export_gate     path: an export goes on there once this file exists
    token_seconds   seconds a generated token takes; it echoes the prompt's words up to max_new_tokens
    notes           folder: `generation_cancelled` appears in it when a generation was cancelled, `exporting` when an
                    export is half-written

Knobs of a training, in the first row of its dataset (a JSONL file), e.g. {"text": "…", "fake": {"steps": 5}}
(`fake_row(steps=5)` makes that line):
    steps           optimizer steps, in place of config.max_steps
    gate            folder: before step N it waits until the file N or "all" is in there; a stop is heeded while it
                    waits. It writes at-N when it begins to wait. `StepGate` (gates.py) opens them.
    step_gate       the same, but inside step N: a stop is heeded only after that step, as in a real one
    preparing       so often it tells that it reads rows
    step_seconds    seconds from the begin of one step to that of the next, counted from the first
    die_at_step     misbehave in step N, before its event
    die             how: the misbehaviour, default SIGKILL
    die_once        path: it dies only if this file is not there yet, and makes it
    flood           N warning events before the first step
    flood_bytes     length of the text of each of them, at least that of its number
    fork            N forked children that never end by themselves, before the first step

Misbehaviour: "SIGKILL", "SIGSEGV", … (a signal to itself), "exit:7" (exit code), "raise" (an unexpected exception),
"sys.exit", "hang" (for ever), "out_of_memory" and "disk_full" (typed errors). It prints one line to the log first.

An empty dataset file is DATASET_EMPTY, a missing one DATASET_NOT_FOUND.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any


def fake_worker_command(
    *, import_gate: Path | None = None, ignore_sigterm: bool = False, model: dict[str, Any] | None = None
) -> list[str]:
    """Returns the `command` of a launcher that starts this double."""
    command = [sys.executable, str(Path(__file__).resolve()), "--model", json.dumps(model or {})]
    if import_gate is not None:
        command += ["--import-gate", str(import_gate)]
    if ignore_sigterm:
        command += ["--ignore-sigterm"]
    return command


def fake_row(text: str = "some text", **knobs: Any) -> str:
    """Returns a JSONL line that scripts a training when it is the first row of the dataset."""
    return json.dumps({"text": text, "fake": knobs}) + "\n"


def main() -> None:
    """Is a worker until the process ends."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--import-gate", default="")
    parser.add_argument("--ignore-sigterm", action="store_true")
    parser.add_argument("--model", type=json.loads, default={})
    parser.add_argument("bundle_dir", type=Path)
    arguments = parser.parse_args()
    os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"

    sys.path.insert(0, str(Path(__file__).resolve().parent))
    from fake_engine import FakeEngine

    from unslothd_server.worker import ending, process

    if arguments.ignore_sigterm:
        ending.Ending.begin = lambda *_args, **_kwargs: None  # type: ignore[method-assign]
    process.run(arguments.bundle_dir, FakeEngine(arguments.import_gate, arguments.model), orphan_check_s=0.1)


if __name__ == "__main__":
    main()
