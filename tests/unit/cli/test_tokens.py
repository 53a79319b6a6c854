"""`unslothd tokens`: one line for scripts, words for people, and what to do when it is not possible."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from unslothd.cli.app import app


@pytest.fixture
def tokens(tmp_path: Path) -> Callable[..., Result]:
    def run(*arguments: str) -> Result:
        return CliRunner().invoke(app, ["tokens", *arguments, "--home", str(tmp_path / "home")], catch_exceptions=False)

    return run


def test_the_token_alone_is_on_stdout(tokens: Callable[..., Result]):
    made = tokens("create", "alice", "--expires-in", "90d")
    assert made.exit_code == 0
    assert made.stdout.startswith("usd_")
    assert made.stdout.count("\n") == 1
    assert 'Token "alice", scope train, expires on ' in made.stderr
    assert "usd_" not in made.stderr


def test_the_list_has_names_scopes_and_times_for_people_and_for_scripts(tokens: Callable[..., Result]):
    assert "`unslothd tokens create NAME` makes one" in tokens("list").stderr
    tokens("create", "alice", "--scope", "admin")
    tokens("create", "bob", "--scope", "read", "--expires-in", "1h")
    assert [line.split()[:2] for line in tokens("list").stdout.splitlines()[1:]] == [
        ["alice", "admin"],
        ["bob", "read"],
    ]
    alice, bob = map(json.loads, tokens("list", "--json").stdout.splitlines())
    assert set(alice) == {"name", "scope", "create_time", "expire_time"}
    assert alice["expire_time"] is None
    assert bob["expire_time"] > bob["create_time"]


def test_a_revoked_token_is_gone_from_the_list(tokens: Callable[..., Result]):
    tokens("create", "alice")
    assert tokens("revoke", "alice").exit_code == 0
    assert tokens("list", "--json").stdout == ""


def test_what_cannot_be_done_is_told_with_the_next_step(tokens: Callable[..., Result]):
    tokens("create", "alice")
    for arguments, text in {
        ("create", "alice"): "Revoke it first",
        ("revoke", "bob"): "Those that there are: alice",
        ("create", "a b"): "cannot be a name",
    }.items():
        failed = tokens(*arguments)
        assert failed.exit_code == 1
        assert text in failed.stderr


@pytest.mark.parametrize("time", ["", "90", "0d", "-1d", "1y", "99999w"])
def test_a_time_that_is_none_is_wrong_usage(tokens: Callable[..., Result], time: str):
    failed = tokens("create", "alice", "--expires-in", time)
    assert failed.exit_code == 2
    assert "12h, 90d or 4w" in " ".join(failed.stderr.replace("│", "").split())
    assert tokens("list", "--json").stdout == ""
