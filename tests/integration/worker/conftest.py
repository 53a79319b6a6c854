"""A home with a launcher that starts doubles, and no process left when a test is over."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from integration.worker.harness import Home
from unslothd_server.workers.liveness import lock_holder, session_members


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Home]:
    yield Home(tmp_path / "home", tmp_path)
    left = [holder for lock in tmp_path.rglob("worker.lock") if (holder := lock_holder(lock))]
    for session in left:
        for pid in session_members(session):
            os.kill(pid, signal.SIGKILL)
    assert not left, "a worker was left behind"
