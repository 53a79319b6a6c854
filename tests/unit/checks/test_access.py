"""What `serve --check` and doctor say of callers."""

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from support.certificates import Authority
from unslothd.v1.server_info_pb2 import Scope
from unslothd_server.access.tokens import TokenFile
from unslothd_server.checks.access import access_findings, unused_token_findings
from unslothd_server.checks.finding import Level
from unslothd_server.config import Settings


def found(home: Path, **settings: object) -> list[tuple[str, str]]:
    return [
        (each.name, str(each.level)) for each in access_findings(Settings.model_validate({"home": home, **settings}))
    ]


@pytest.fixture
def tls(tmp_path: Path) -> dict[str, object]:
    cert, key = Authority(tmp_path / "authority").server()
    return {"listen": "0.0.0.0:1", "tls_cert": cert, "tls_key": key}


def test_that_nobody_is_asked_is_fine_on_the_loopback_only(tmp_path: Path):
    assert found(tmp_path) == [("callers", "ok")]
    assert found(tmp_path, listen="0.0.0.0:1", allow_insecure_listen=True) == [("callers", "warning")]


def test_a_server_that_nobody_can_call_yet_is_told(tmp_path: Path, tls: dict[str, object]):
    assert found(tmp_path, **tls) == [("callers", "warning"), ("certificate", "ok")]
    TokenFile(tmp_path).create("alice", Scope.SCOPE_READ, None)
    assert found(tmp_path, **tls) == [("callers", "ok"), ("certificate", "ok")]
    (tmp_path / "tokens.json").write_text("{")
    assert found(tmp_path, **tls)[0] == ("callers", "problem")


def test_client_certificates_are_enough_unless_the_scope_says_otherwise(tmp_path: Path, tls: dict[str, object]):
    ca = Authority(tmp_path / "callers").ca
    assert found(tmp_path, **tls, tls_client_ca=ca)[0] == ("callers", "ok")
    assert found(tmp_path, **tls, tls_client_ca=ca, tls_client_scope="none")[0] == ("callers", "warning")


def test_a_certificate_that_ends_soon_is_told(tmp_path: Path):
    cert, key = Authority(tmp_path / "authority").server("soon", starts_in=-timedelta(days=20))
    assert ("certificate", "warning") in found(tmp_path, tls_cert=cert, tls_key=key)


def test_tokens_that_cross_the_network_in_the_clear_are_told(tmp_path: Path):
    TokenFile(tmp_path).create("alice", Scope.SCOPE_READ, None)
    behind_a_proxy = {"listen": "0.0.0.0:1", "allow_insecure_listen": True, "require_identity": "yes"}
    assert found(tmp_path, **behind_a_proxy) == [("callers", "ok"), ("callers' tokens", "warning")]
    assert found(tmp_path, require_identity="yes") == [("callers", "ok")]


def test_a_file_of_tokens_that_others_can_read_is_told(tmp_path: Path):
    TokenFile(tmp_path).create("alice", Scope.SCOPE_READ, None)
    assert ("file of tokens", "warning") not in found(tmp_path)
    (tmp_path / "tokens.json").chmod(0o644)
    assert ("file of tokens", "warning") in found(tmp_path)


def test_tokens_that_are_over_are_told_by_name(tmp_path: Path):
    tokens = TokenFile(tmp_path)
    for name, ends_in in {"alice": -timedelta(days=1), "bob": timedelta(days=1)}.items():
        tokens.create(name, Scope.SCOPE_READ, datetime.now(UTC) + ends_in)
    tokens.create("carol", Scope.SCOPE_READ, None)
    (finding,) = [each for each in access_findings(Settings(home=tmp_path)) if each.name == "expired tokens"]
    assert (finding.level, finding.text) == (Level.WARNING, "refused: alice")


def days_ago(days: float) -> str:
    return (datetime.now(UTC) - timedelta(days=days)).isoformat(timespec="milliseconds")


def a_token(home: Path, name: str, *, made_days_ago: float, expired: bool = False) -> None:
    """Makes a token and lets it look as if it had been made then."""
    file = TokenFile(home)
    file.create(name, Scope.SCOPE_READ, datetime.now(UTC) if expired else None)
    content = json.loads(file.path.read_text())
    content["tokens"][-1]["create_time"] = days_ago(made_days_ago)
    file.path.write_text(json.dumps(content))


def a_log(home: Path, calls: dict[str, float], file: str = "audit.jsonl") -> None:
    """Writes lines of callers with tokens, so many days ago."""
    lines = [{"time": days_ago(days), "caller": name, "kind": "token"} for name, days in calls.items()]
    (home / file).write_text("".join(json.dumps(line) + "\n" for line in lines))


def unused(home: Path) -> list[str]:
    """What is said of each token that is called unused, the day left out."""
    found = list(unused_token_findings(Settings(home=home)))
    assert all(each.level is Level.WARNING for each in found)
    texts = [each.text.removeprefix("no call by ").removesuffix(", as far as the audit log goes") for each in found]
    return [part.partition(" ")[0] for text in texts for part in text.split(", ")]


def test_a_token_without_a_call_for_a_month_is_told(tmp_path: Path):
    for name in ("never", "lately", "long-ago"):
        a_token(tmp_path, name, made_days_ago=100)
    a_token(tmp_path, "over", made_days_ago=100, expired=True)
    a_log(tmp_path, {"lately": 29})
    a_log(tmp_path, {"somebody": 90, "long-ago": 40, "lately": 60}, "audit.jsonl.1")
    assert unused(tmp_path) == ["never", "long-ago"]


def test_calls_with_a_revoked_token_of_the_same_name_do_not_count_but_a_new_token_has_a_month(tmp_path: Path):
    a_token(tmp_path, "made-again", made_days_ago=31)
    a_token(tmp_path, "new", made_days_ago=29)
    a_log(tmp_path, {"made-again": 50})
    assert unused(tmp_path) == ["made-again"]


def test_of_a_time_that_the_audit_log_does_not_tell_nothing_is_said(tmp_path: Path):
    a_token(tmp_path, "alice", made_days_ago=100)
    assert unused(tmp_path) == []
    a_log(tmp_path, {"somebody": 20})
    assert unused(tmp_path) == []


def test_a_certificate_with_the_name_of_a_token_is_no_call_of_it(tmp_path: Path):
    a_token(tmp_path, "alice", made_days_ago=100)
    lines = [{"time": days_ago(days), "caller": "alice", "kind": "certificate"} for days in (60, 0)]
    (tmp_path / "audit.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert unused(tmp_path) == ["alice"]


def test_lines_of_the_audit_log_that_are_damaged_or_tell_of_lost_ones_are_passed_over(tmp_path: Path):
    a_token(tmp_path, "alice", made_days_ago=100)
    a_log(tmp_path, {"somebody": 60})
    with (tmp_path / "audit.jsonl").open("a") as log:
        log.write('{"lost_lines": 3}\n[]\n{"time": "20')
    assert unused(tmp_path) == ["alice"]
