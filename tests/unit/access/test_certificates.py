"""The served certificate follows its files, and never gives way to something bad."""

import shutil
from datetime import timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ed25519
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from support.certificates import Authority
from unslothd_server.access.certificates import (
    CertificateProblem,
    ServedCertificate,
    TlsFiles,
    check_certificate,
    check_key,
)


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "authority")


@pytest.fixture
def files(authority: Authority) -> TlsFiles:
    return TlsFiles(*authority.server(), client_ca=authority.ca)


def put(source: Path, target: Path) -> None:
    """Replaces a file in one step, as renewals do."""
    shutil.copy(source, target.with_suffix(".new")).replace(target)


def test_files_that_stay_are_no_change(files: TlsFiles):
    served = ServedCertificate(files)
    assert served.content.cert == files.cert.read_bytes()
    assert served.content.client_ca == files.client_ca.read_bytes()
    assert served.changed() is None


def test_a_renewed_certificate_is_served_once_its_key_is_there_too(files: TlsFiles, authority: Authority):
    served = ServedCertificate(files)
    cert, key = authority.server("renewed")
    put(cert, files.cert)
    assert served.changed() is None
    put(key, files.key)
    changed = served.changed()
    assert changed == served.content
    assert (changed.cert, changed.key) == (cert.read_bytes(), key.read_bytes())
    assert served.changed() is None


def test_authorities_of_clients_are_followed_too(files: TlsFiles, tmp_path: Path):
    served = ServedCertificate(files)
    other = Authority(tmp_path / "other").ca
    put(other, files.client_ca)
    assert served.changed().client_ca == other.read_bytes()


@pytest.mark.parametrize("bad", ["missing", "damaged", "expired"])
def test_a_bad_change_is_not_served_and_a_good_one_after_it_is(bad: str, files: TlsFiles, authority: Authority):
    served = ServedCertificate(files)
    before = served.content
    if bad == "missing":
        files.cert.unlink()
    elif bad == "damaged":
        files.cert.write_text("-----BEGIN CERTIFICATE-----\n")
    else:
        for source, target in zip(
            authority.server("old", starts_in=-timedelta(days=31)), (files.cert, files.key), strict=True
        ):
            put(source, target)
    assert served.changed() is None
    assert served.content == before
    for source, target in zip(authority.server("new"), (files.cert, files.key), strict=True):
        put(source, target)
    assert served.changed() is not None


def test_a_certificate_of_the_future_is_told_with_its_first_day(authority: Authority):
    cert, _ = authority.server("future", starts_in=timedelta(days=2))
    with pytest.raises(CertificateProblem, match="is valid from"):
        check_certificate(cert)


def test_a_key_that_needs_a_password_is_told(files: TlsFiles):
    key = load_pem_private_key(files.key.read_bytes(), None)
    files.key.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"secret")))
    with pytest.raises(CertificateProblem, match="is encrypted"):
        check_key(files.key)


def test_a_key_that_grpc_cannot_serve_is_told_at_the_start(files: TlsFiles):
    key = ed25519.Ed25519PrivateKey.generate()
    files.key.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    with pytest.raises(CertificateProblem, match="RSA or EC"):
        check_key(files.key)


@pytest.mark.parametrize(
    ("mode", "good"), [(0o600, True), (0o400, True), (0o640, True), (0o660, False), (0o604, False)]
)
def test_a_key_may_be_read_by_a_group_of_the_operator_but_by_nobody_else(files: TlsFiles, mode: int, good: bool):
    files.key.chmod(mode)
    if good:
        check_key(files.key)
        return
    with pytest.raises(CertificateProblem, match=f"mode 0{mode:o}"):
        check_key(files.key)
