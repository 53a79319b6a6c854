"""What doctor says of the Hub and the clock."""

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from unslothd_server.checks.finding import Finding, Level
from unslothd_server.checks.network import hub_and_clock_findings

Hub = Callable[[float], list[str]]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Starts a Hub whose clock is off by some seconds; returns the methods of its requests."""
    servers: list[HTTPServer] = []

    def start(off: float) -> list[str]:
        asked: list[str] = []

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                asked.append(self.command)
                self.send_response_only(404)
                self.send_header("Date", formatdate(time.time() + off, usegmt=True))
                self.end_headers()

        server = HTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, args=(0.05,)).start()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        return asked

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("no_proxy", "*")
    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def found(home: Path, seconds: float = 10.0) -> dict[str, Finding]:
    return {finding.name: finding for finding in hub_and_clock_findings(home, seconds)}


def test_a_hub_that_answers_and_a_clock_that_agrees_are_ok(hub: Hub, tmp_path: Path):
    hub(0)
    assert {name: finding.level for name, finding in found(tmp_path).items()} == {"Hub": Level.OK, "clock": Level.OK}


def test_a_token_is_told_to_be_there_and_never_shown_or_sent(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    hub(0)
    monkeypatch.setenv("HF_TOKEN", "hf_planted")
    finding = found(tmp_path)["Hub"]
    assert "with a token" in finding.text
    assert "hf_planted" not in repr(finding)


def test_a_clock_an_hour_off_is_a_warning(hub: Hub, tmp_path: Path):
    hub(3600)
    clock = found(tmp_path)["clock"]
    assert clock.level is Level.WARNING
    assert "set-ntp" in clock.mend


def test_no_hub_is_a_warning_that_says_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{unused.getsockname()[1]}")
        monkeypatch.setenv("no_proxy", "*")
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        finding = found(tmp_path)["Hub"]
    assert finding.level is Level.WARNING
    assert finding.text.startswith("offline: ")
    assert "HF_HUB_OFFLINE=1" in finding.mend


def test_a_hub_that_never_answers_is_waited_for_so_long_and_no_longer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setenv("no_proxy", "*")
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        started = time.monotonic()
        finding = found(tmp_path, 0.5)["Hub"]
        assert time.monotonic() - started < 30
    assert finding.level is Level.WARNING


def test_an_operator_who_is_offline_by_choice_is_not_connected_at_all(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    asked = hub(0)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert found(tmp_path)["Hub"].level is Level.OK
    assert asked == []


def test_trainings_of_the_future_say_that_the_clock_went_back(hub: Hub, tmp_path: Path):
    hub(0)
    training = tmp_path / "trainings" / "training-1"
    training.mkdir(parents=True)
    os.utime(training, (time.time() + 7200, time.time() + 7200))
    clock = found(tmp_path)["clock"]
    assert clock.level is Level.PROBLEM
    assert "the clock went back" in clock.text
