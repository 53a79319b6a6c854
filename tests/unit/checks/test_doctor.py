"""`unslothd doctor`: a report for people or as JSON, and its exit code."""

import json
import os
import re
import socket
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from unslothd.cli.app import app
from unslothd.v1.server_info_pb2 import Scope
from unslothd_server import doctor
from unslothd_server.access.tokens import TokenFile
from unslothd_server.home_lock import HomeLock


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("UNSLOTHD_CONFIG", "")


def diagnosed(folder: Path, *arguments: str, listen: str = "127.0.0.1:0") -> Result:
    command = ["doctor", "--quick", "--listen", listen, "--home", str(folder / "home")]
    return CliRunner().invoke(app, [*command, "--output-root", str(folder / "output"), *arguments])


def test_warnings_alone_end_with_0_and_the_json_has_every_finding(tmp_path: Path):
    done = diagnosed(tmp_path, "--json", "--model-root", str(tmp_path / "missing"), "--metrics-listen", "0")
    report = json.loads(done.stdout)
    assert (done.exit_code, report["problems"]) == (0, 0)
    assert report["warnings"] >= 1
    names = {finding["name"] for finding in report["findings"]}
    assert {
        "driver",
        "packages",
        "home",
        "output root",
        "disk",
        "file system",
        "listen",
        "Hub",
        "clock",
        "open files",
        "callers",
        "metrics",
    } <= names
    assert all(finding["mend"] for finding in report["findings"] if finding["level"] != "ok")
    assert list(tmp_path.iterdir()) == []


def test_what_stops_work_ends_with_1_and_says_what_to_mend(tmp_path: Path):
    (tmp_path / "output").write_text("a file")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        done = diagnosed(tmp_path, listen=f"127.0.0.1:{taken.getsockname()[1]}")
    assert done.exit_code == 1
    assert "→ Stop what listens there" in done.stdout
    assert "→ Move it away, or choose another folder with --output-root." in done.stdout
    assert "problems: 2" in done.stdout


def test_the_port_of_a_server_that_runs_on_this_home_is_no_problem(tmp_path: Path):
    (tmp_path / "home").mkdir(mode=0o700)
    lock = HomeLock(tmp_path / "home")
    with socket.create_server(("127.0.0.1", 0)) as own:
        done = diagnosed(tmp_path, listen=f"127.0.0.1:{own.getsockname()[1]}")
    lock.release()
    assert done.exit_code == 0
    assert f"process {os.getpid()} serves this home" in done.stdout


def test_tokens_that_nobody_uses_are_told(tmp_path: Path):
    home = tmp_path / "home"
    home.mkdir(mode=0o700)
    TokenFile(home).create("alice", Scope.SCOPE_READ, None)
    tokens = home / "tokens.json"
    tokens.write_text(re.sub(r'"create_time": "\d+', '"create_time": "2020', tokens.read_text()))
    (home / "audit.jsonl").write_text('{"time": "2020-02-01T00:00:00+00:00", "kind": "anonymous"}\n')
    assert "no call by alice since 2020-" in diagnosed(tmp_path).stdout


def test_settings_that_are_wrong_are_problems_and_the_rest_is_checked(tmp_path: Path):
    done = diagnosed(tmp_path, "--max-loaded-models", "0", "--stall-seconds", "0")
    assert done.exit_code == 1
    assert "--max-loaded-models: " in done.stdout
    assert "--stall-seconds: " in done.stdout
    assert "open files" in done.stdout


def test_wrong_usage_ends_with_2():
    assert doctor.run(["--no-such-flag"]) == 2
