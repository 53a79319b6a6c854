"""A worker's end: watchers of a training get its last events, also when it is over before anybody waits for it."""

from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any

import pytest

from unslothd_server.worker import ending as ending_module
from unslothd_server.worker.ending import Ending

SECONDS = 10


class Process:
    """What an end needs, with notes of what it did.

    Args:
        runs: What is active at each look; None afterwards.
    """

    def __init__(self, runs: list[Any]) -> None:
        self._runs = runs
        self.grace: float | None = None
        self.over = Event()

    def refuse_new_work(self) -> None:
        """Nothing: there is none."""

    def active_run(self) -> Any:
        return self._runs.pop(0) if self._runs else None

    def stop(self, grace: float) -> Event:
        """As of a gRPC server."""
        self.grace = grace
        stopped = Event()
        stopped.set()
        return stopped


def ended(monkeypatch: pytest.MonkeyPatch, runs: list[Any]) -> float | None:
    """The seconds that calls under way get when a worker ends."""
    process = Process(runs)
    monkeypatch.setattr(ending_module, "exit_now", lambda *_: process.over.set())
    bundle: Any = SimpleNamespace(exit_record=Path("unused"))
    holder: Any = process
    Ending(holder, holder, bundle).begin("asked", save_checkpoint=False)
    assert process.over.wait(SECONDS)
    return process.grace


def test_a_training_that_ends_meanwhile_has_watchers_that_want_its_last_events(monkeypatch: pytest.MonkeyPatch):
    training = SimpleNamespace(
        stop=SimpleNamespace(requested=Event()), cancel=lambda *, save_checkpoint: None, wait_over=lambda: None
    )
    assert ended(monkeypatch, [training]) == ending_module._LAST_EVENTS_S


def test_without_a_training_only_the_last_answer_is_waited_for(monkeypatch: pytest.MonkeyPatch):
    assert ended(monkeypatch, []) == ending_module._LAST_ANSWER_S
