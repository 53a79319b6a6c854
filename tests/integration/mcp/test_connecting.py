"""The command line and the adapter reach a real server with TLS and tokens, by environment and by profile."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.mcp_agents import agent
from support.secure_server import SecureServer
from support.terminal import environment


@pytest.fixture(scope="module")
def secure_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SecureServer]:
    with SecureServer(tmp_path_factory.mktemp("secure")) as running:
        yield running


@pytest.fixture
def profile(secure_server: SecureServer, tmp_path: Path) -> Path:
    """$XDG_CONFIG_HOME with a default profile for the server, whose token may read."""
    folder = tmp_path / "config" / "unslothd"
    folder.mkdir(parents=True)
    (folder / "token").touch(0o600)
    (folder / "token").write_text(secure_server.tokens["read"])
    (folder / "ca.pem").write_bytes(secure_server.authority.ca.read_bytes())
    (folder / "config.toml").write_text(
        f'[profiles.default]\ntarget = "{secure_server.target}"\nca = "ca.pem"\ntoken_file = "token"\n'
    )
    return folder.parent


def unslothd(config: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "unslothd.cli", *arguments]
    return subprocess.run(
        command,
        check=False,
        env=environment() | {"XDG_CONFIG_HOME": str(config)},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_the_command_line_needs_no_flag_with_a_default_profile(secure_server: SecureServer, profile: Path):
    done = unslothd(profile, "info")
    assert (done.returncode, done.stderr) == (0, "")
    assert f"at {secure_server.target}" in done.stdout


def test_a_refused_call_ends_with_1_and_says_what_is_missing(secure_server: SecureServer, profile: Path):
    done = unslothd(profile, "models", "load", "tiny")
    assert done.returncode == 1
    assert "PERMISSION_DENIED INSUFFICIENT_SCOPE" in done.stderr
    nobody = unslothd(profile, "info", "--target", secure_server.target, "--ca", str(secure_server.authority.ca))
    assert nobody.returncode == 1
    assert "UNAUTHENTICATED TOKEN_MISSING" in nobody.stderr
    assert secure_server.tokens["read"] not in done.stderr + nobody.stderr


@pytest.mark.anyio
async def test_the_adapter_shows_the_token_of_its_environment_and_agents_never_see_it(
    secure_server: SecureServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setenv("UNSLOTHD_TOKEN", secure_server.tokens["read"])
    async with agent(secure_server.target, "--ca", str(secure_server.authority.ca)) as connected:
        found = await connected.call("unsloth_server_info")
        refused = await connected.error("unsloth_load_model", model_name="tiny")
    assert found["caller"] == {"name": "read", "kind": "token", "scope": "read"}
    assert refused["reason"] == "INSUFFICIENT_SCOPE"
    assert secure_server.tokens["read"] not in str([found, refused])
