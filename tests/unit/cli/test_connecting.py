"""Every command takes where the server is, how it is trusted and whose token is shown, from flags and a profile."""

from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from typer.testing import CliRunner, Result

from support.certificates import Authority
from support.scripted_server import Say, ScriptedServer
from unslothd.cli.app import app
from unslothd.v1 import service_pb2

TOKEN = "unslothd_planted-token"


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "authority")


@pytest.fixture
def secure_server(authority: Authority) -> Iterator[ScriptedServer]:
    certificate, key = authority.server()
    running = ScriptedServer(grpc.ssl_server_credentials([(key.read_bytes(), certificate.read_bytes())]))
    running.script.on("GetServerInfo", Say.answer(service_pb2.GetServerInfoResponse(server_version="1.2.3")))
    yield running
    running.stop()


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    file = tmp_path / "token"
    file.touch(0o600)
    file.write_text(f"{TOKEN}\n")
    return file


def run(*arguments: str, **environment: str) -> Result:
    return CliRunner(env={"XDG_CONFIG_HOME": "/nowhere", **environment}).invoke(app, arguments, catch_exceptions=False)


def shows_the_token(done: Result, server: ScriptedServer) -> bool:
    assert done.exit_code == 0, done.output
    assert f"unslothd 1.2.3 at {server.target}" in done.output
    assert TOKEN not in done.output
    return server.script.metadata[-1].get("authorization") == f"Bearer {TOKEN}"


def test_flags_name_server_authority_and_token(secure_server, authority, token_file):
    flags = ("--target", secure_server.target, "--ca", str(authority.ca), "--token-file", str(token_file))
    assert shows_the_token(run("info", *flags), secure_server)


def test_the_environment_names_them(secure_server, authority):
    done = run(
        "info", UNSLOTHD_TARGET=secure_server.target, UNSLOTHD_CA=str(authority.ca), UNSLOTHD_TOKEN=TOKEN
    )  # fmt: skip
    assert shows_the_token(done, secure_server)


def test_a_profile_names_them(secure_server, authority, token_file, tmp_path):
    folder = tmp_path / "unslothd"
    folder.mkdir()
    (folder / "config.toml").write_text(
        f'[profiles.lab]\ntarget = "{secure_server.target}"\nca = "{authority.ca}"\ntoken_file = "{token_file}"\n'
    )
    done = run("info", "--profile", "lab", XDG_CONFIG_HOME=str(tmp_path))
    assert shows_the_token(done, secure_server)


def test_settings_that_reach_no_server_are_wrong_usage(token_file):
    done = run("models", "list", "--target", "gpu-host:50051", "--token-file", str(token_file))
    assert done.exit_code == 2
    assert "a token for gpu-host:50051 would travel in plain text" in done.output
    assert TOKEN not in done.output


def test_no_option_takes_the_servers_token_itself(tmp_path):
    help_text = run("info", "--help").output
    assert "--token-file" in help_text
    assert "--token " not in help_text
