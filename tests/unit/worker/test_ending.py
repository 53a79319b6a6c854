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
        self.waited: list[tuple[float, float | None]] = []
        self.over = Event()

    def refuse_new_work(self) -> None:
        """Nothing: there is none."""

    def active_run(self) -> Any:
        return self._runs.pop(0) if self._runs else None

    def wait(self, seconds: float) -> None:
        """As of an event that nobody sets: notes for how long, and whether the server was stopped already."""
        self.waited.append((seconds, self.grace))

    def stop(self, grace: float) -> Event:
        """As of a gRPC server."""
        self.grace = grace
        stopped = Event()
        stopped.set()
        return stopped


def training() -> Any:
    """One that is over as soon as somebody waits for that."""
    return SimpleNamespace(
        stop=SimpleNamespace(requested=Event()), cancel=lambda *, save_checkpoint: None, wait_over=lambda: None
    )


def ended(monkeypatch: pytest.MonkeyPatch, runs: list[Any]) -> Process:
    """A worker that came to its end."""
    process = Process(runs)
    monkeypatch.setattr(ending_module, "Event", lambda: process)
    monkeypatch.setattr(ending_module, "exit_now", lambda *_: process.over.set())
    bundle: Any = SimpleNamespace(exit_record=Path("unused"))
    holder: Any = process
    Ending(holder, holder, bundle).begin("asked", save_checkpoint=False)
    assert process.over.wait(SECONDS)
    return process


def test_a_training_that_ends_meanwhile_has_watchers_that_want_its_last_events(monkeypatch: pytest.MonkeyPatch):
    assert ended(monkeypatch, [training()]).grace == ending_module._LAST_EVENTS_S


def test_connections_stay_until_watchers_had_time_to_read_the_end_of_a_training(monkeypatch: pytest.MonkeyPatch):
    assert ended(monkeypatch, [training()]).waited == [(ending_module._UNREAD_S, None)]


def test_without_a_training_only_the_last_answer_is_waited_for(monkeypatch: pytest.MonkeyPatch):
    process = ended(monkeypatch, [])
    assert (process.grace, process.waited) == (ending_module._LAST_ANSWER_S, [])
