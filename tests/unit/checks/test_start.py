"""`unslothd serve --check`: all that a start would refuse, told without starting or changing anything."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.heeding_modes import heeding_modes
from unslothd_server.home_lock import HomeLock


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


def checked(folder: Path, *arguments: str, listen: str = "127.0.0.1:0") -> tuple[int, str]:
    """Runs the check with home and output below a folder; modes hold, also for root."""
    command = [sys.executable, "-m", "unslothd_server", "--check", "--listen", listen, *arguments]
    command += ["--home", str(folder / "home"), "--output-root", str(folder / "output")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "UNSLOTHD_CONFIG": ""}
    done = subprocess.run(
        heeding_modes(command), env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    return done.returncode, done.stdout + done.stderr


def problems(report: str) -> list[str]:
    return [line.strip().removeprefix("problem").strip() for line in report.splitlines() if "  problem " in line]


def test_what_a_start_would_accept_ends_with_0_and_leaves_no_trace(tmp_path: Path):
    code, report = checked(tmp_path)
    assert (code, problems(report)) == (0, [])
    assert "a start would be accepted" in report
    assert list(tmp_path.iterdir()) == []


def test_every_setting_is_shown_with_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("UNSLOTHD_STALL_SECONDS", "60")
    shown = {tuple(line.split()) for line in checked(tmp_path)[1].splitlines()}
    assert ("home", str(tmp_path / "home"), "--home") in shown
    assert ("stall_seconds", "60.0", "UNSLOTHD_STALL_SECONDS") in shown
    assert ("on_shutdown", "pause", "default") in shown


def test_everything_that_a_start_would_refuse_is_told_at_once(tmp_path: Path, taken_port: int):
    (tmp_path / "home").mkdir()
    (tmp_path / "output").write_text("a file")
    lock = HomeLock(tmp_path / "home")
    (tmp_path / "home").chmod(0o500)
    code, report = checked(tmp_path, listen=f"127.0.0.1:{taken_port}")
    lock.release()
    found = {line.split("  ")[0]: line for line in problems(report)}
    assert code == 2
    assert f"another server (process {os.getpid()}) uses the home" in found["home lock"]
    assert "cannot be written to" in found["home"]
    assert "is no folder" in found["output root"]
    assert f"127.0.0.1:{taken_port} cannot be listened on" in found["listen"]
    assert len(found) == 4


def test_the_port_of_the_metrics_has_to_be_free_too(tmp_path: Path, taken_port: int):
    code, report = checked(tmp_path, "--metrics-listen", str(taken_port))
    assert code == 2
    assert f"metrics listen 127.0.0.1:{taken_port} cannot be listened on" in report


def test_traces_that_cannot_be_sent_are_a_warning_with_the_next_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "http/json")
    code, report = checked(tmp_path)
    assert code == 0
    assert "OTEL_EXPORTER_OTLP_PROTOCOL=http/json is not supported" in report
    assert "→ Set it to grpc or http/protobuf." in report


def test_a_server_that_ended_does_not_hold_its_home(tmp_path: Path):
    (tmp_path / "home").mkdir()
    HomeLock(tmp_path / "home").release()
    assert checked(tmp_path)[0] == 0


def test_a_model_root_that_is_not_there_yet_is_a_warning_for_a_start_works_without_it(tmp_path: Path):
    code, report = checked(tmp_path, "--model-root", str(tmp_path / "missing"))
    assert code == 0
    assert f"{tmp_path / 'missing'} is no folder" in report


def test_settings_that_are_wrong_end_with_2_as_a_start_does(tmp_path: Path):
    code, report = checked(tmp_path, "--max-loaded-models", "0", listen="nowhere")
    assert code == 2
    assert "--max-loaded-models: " in report
    assert "--listen: " in report
