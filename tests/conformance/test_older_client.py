"""Whoever took the stubs of the first commit still trains with today's server."""

import os
import subprocess
import sys
from pathlib import Path

from conformance import first_client
from doubles.fake_worker import fake_row
from support.running_server import RunningServer


def test_a_client_with_the_stubs_of_the_first_commit_runs_a_training(server: RunningServer) -> None:
    (server.model_root / "first.jsonl").write_text(fake_row(steps=2))
    done = subprocess.run(
        [sys.executable, "-S", str(Path(first_client.__file__)), server.target, "first.jsonl"],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path.endswith("site-packages"))},
    )
    assert done.stdout.split() == [
        "state_changed",
        "state_changed",
        "started",
        "step",
        "step",
        "checkpoint_saved",
        "succeeded",
    ], done.stderr
