"""Tokens: kept as hashes only, whole files only, and a change counts from the next look on."""

import hmac
import json
import re
import stat
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from hmac import compare_digest
from pathlib import Path

import pytest

from unslothd.v1.server_info_pb2 import Scope
from unslothd_server.access.tokens import TokenBook, TokenFile, TokensError

TRAIN = Scope.SCOPE_TRAIN


@pytest.fixture
def file(tmp_path: Path) -> TokenFile:
    return TokenFile.of(tmp_path / "home")


def test_a_token_has_256_random_bits_behind_a_prefix_that_scanners_know(file: TokenFile):
    made = {file.create(f"token-{number}", TRAIN, None) for number in range(3)}
    assert len(made) == 3
    assert all(re.fullmatch(r"usd_[0-9a-f]{64}", each) for each in made)


def test_the_token_itself_is_not_in_the_file_and_only_its_user_reads_that(file: TokenFile):
    secret = file.create("alice", TRAIN, None)
    assert secret.removeprefix("usd_") not in file.path.read_text()
    assert {stat.S_IMODE(each.stat().st_mode) for each in file.path.parent.iterdir()} == {0o600}
    assert stat.S_IMODE(file.path.parent.stat().st_mode) == 0o700


def test_the_file_has_a_version_and_one_that_is_newer_is_not_guessed_at(file: TokenFile):
    file.create("alice", TRAIN, None)
    content = json.loads(file.path.read_text())
    assert content["version"] == 1
    file.path.write_text(json.dumps({**content, "version": 2}))
    with pytest.raises(TokensError, match="version 2"):
        file.read()


def test_a_token_is_found_with_its_scope_and_another_is_not(file: TokenFile):
    alice, bob = file.create("alice", TRAIN, None), file.create("bob", Scope.SCOPE_READ, None)
    book = TokenBook(file)
    found = [book.find(secret) for secret in (alice, bob, alice[:-1], alice.upper(), "usd_", "")]
    assert [(each.name, each.scope) if each else None for each in found] == [
        ("alice", TRAIN),
        ("bob", Scope.SCOPE_READ),
        None,
        None,
        None,
        None,
    ]


def test_every_hash_is_compared_in_constant_time_whichever_it_is(file: TokenFile, monkeypatch: pytest.MonkeyPatch):
    """The time itself is too short to be measured here; this is what it depends on."""
    first, last = file.create("first", TRAIN, None), file.create("last", TRAIN, None)
    book = TokenBook(file)
    compared: list[str] = []

    def compare(one: str, other: str) -> bool:
        compared.append(one)
        return compare_digest(one, other)

    monkeypatch.setattr(hmac, "compare_digest", compare)
    for secret in (first, last, "usd_wrong"):
        compared.clear()
        book.find(secret)
        assert compared == [token.sha256 for token in file.read()]


def test_what_is_made_and_revoked_counts_from_the_next_look_on(file: TokenFile):
    book = TokenBook(file)
    assert book.find("usd_x") is None
    secret = file.create("alice", TRAIN, None)
    token = book.find(secret)
    assert token is not None
    assert book.holds(token)
    file.revoke("alice")
    assert book.find(secret) is None
    assert not book.holds(token)


def test_a_new_token_of_an_old_name_is_another_token(file: TokenFile):
    book = TokenBook(file)
    old = book.find(file.create("alice", TRAIN, None))
    file.revoke("alice")
    file.create("alice", TRAIN, None)
    assert old is not None
    assert not book.holds(old)


def test_a_token_whose_time_is_over_is_known_but_does_not_hold(file: TokenFile):
    book = TokenBook(file)
    over = book.find(file.create("over", TRAIN, datetime.now(UTC) - timedelta(seconds=2)))
    ahead = book.find(file.create("ahead", TRAIN, datetime.now(UTC) + timedelta(hours=1)))
    assert over is not None
    assert over.expired
    assert not book.holds(over)
    assert ahead is not None
    assert book.holds(ahead)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"version": 1}', '{"version": 1, "tokens": [{}]}'])
def test_a_damaged_file_lets_nobody_in_and_is_not_written_over(file: TokenFile, text: str):
    secret = file.create("alice", TRAIN, None)
    book = TokenBook(file)
    assert book.find(secret) is not None
    file.path.write_text(text)
    assert book.find(secret) is None
    with pytest.raises(TokensError, match="damaged"):
        file.create("bob", TRAIN, None)
    assert file.path.read_text() == text


def test_a_name_that_is_taken_or_none_is_refused_with_what_to_do(file: TokenFile):
    file.create("alice", TRAIN, None)
    with pytest.raises(TokensError, match="Revoke it first"):
        file.create("alice", TRAIN, None)
    for name in ("", "a b", "-a", "a/b", "a\n", "ä", "a" * 65):
        with pytest.raises(TokensError, match="cannot be a name"):
            file.create(name, TRAIN, None)
    with pytest.raises(TokensError, match="Those that there are: alice"):
        file.revoke("bob")


def test_tokens_that_are_made_at_once_are_all_kept(file: TokenFile):
    names = [f"token-{number}" for number in range(20)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: file.create(name, TRAIN, None), names))
    assert {token.name for token in file.read()} == set(names)


def test_a_home_of_another_user_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("os.geteuid", lambda: tmp_path.stat().st_uid + 1)
    with pytest.raises(TokensError, match="sudo -u"):
        TokenFile.of(tmp_path)
    assert list(tmp_path.iterdir()) == []
