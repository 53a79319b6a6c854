"""What `serve --check` says of callers."""

from datetime import timedelta
from pathlib import Path

import pytest

from support.certificates import Authority
from unslothd.v1.server_info_pb2 import Scope
from unslothd_server.access.tokens import TokenFile
from unslothd_server.checks.access import access_findings
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
