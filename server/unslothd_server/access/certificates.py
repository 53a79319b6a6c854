"""The server's certificate: what is wrong with its files, and reading them again when they change."""

import stat
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import structlog

if TYPE_CHECKING:  # imported where it is used: 9 MB that a server without TLS does not need
    from cryptography.hazmat.primitives.asymmetric.types import PublicKeyTypes
    from cryptography.x509 import Certificate

log = structlog.get_logger()

_BAD_KEY_MODES = stat.S_IRWXO | stat.S_IWGRP
SOON_DAYS = 14


class CertificateProblem(ValueError):
    """A certificate or key cannot be served; the text names the file and what to do."""


@dataclass(frozen=True)
class TlsFiles:
    """Where the certificate is. All files are PEM.

    Args:
        cert: The server's certificate, then those between it and the authority.
        key: Its private key.
        client_ca: Authorities whose client certificates are accepted; None = none is asked for.
    """

    cert: Path
    key: Path
    client_ca: Path | None = None


@dataclass(frozen=True)
class TlsContent:
    """What the files hold."""

    cert: bytes
    key: bytes
    client_ca: bytes | None


def read_content(files: TlsFiles) -> TlsContent:
    """Returns what can be served. Raises CertificateProblem: for a file by itself, or a key that is not the cert's."""
    content = TlsContent(_read(files.cert), _read(files.key), _read(files.client_ca) if files.client_ca else None)
    certificate = _certificate(files.cert, content.cert)
    if _public_key(files.key, content.key) != certificate.public_key():
        raise CertificateProblem(f"{files.key} is not the key of {files.cert}; name the two that were made together")
    if files.client_ca and content.client_ca:
        _certificate(files.client_ca, content.client_ca)
    return content


def check_certificate(path: Path) -> None:
    """Raises CertificateProblem for a file whose first certificate is not good now."""
    _certificate(path, _read(path))


def days_left(path: Path) -> int:
    """Whole days until a file's first certificate expires. Raises CertificateProblem as check_certificate."""
    return (_certificate(path, _read(path)).not_valid_after_utc - datetime.now(UTC)).days


def check_key(path: Path) -> None:
    """Raises CertificateProblem for a key that cannot be served, or that others can use."""
    _public_key(path, _read(path))


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CertificateProblem(f"{path} cannot be read ({error.strerror})") from error


def _certificate(path: Path, content: bytes) -> "Certificate":
    from cryptography import x509

    try:
        first = x509.load_pem_x509_certificates(content)[0]
    except ValueError as error:
        raise CertificateProblem(f"{path} holds no certificate in PEM form (-----BEGIN CERTIFICATE-----)") from error
    now = datetime.now(UTC)
    if first.not_valid_after_utc <= now:
        raise CertificateProblem(f"{path} expired on {first.not_valid_after_utc:%Y-%m-%d}; get a new certificate")
    if first.not_valid_before_utc > now:
        raise CertificateProblem(
            f"{path} is valid from {first.not_valid_before_utc:%Y-%m-%d %H:%M} UTC on; is the clock right?"
        )
    return first


def _public_key(path: Path, content: bytes) -> "PublicKeyTypes":
    """The public half of a private key that is good."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric import ec, rsa
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        key = load_pem_private_key(content, None)
    except TypeError:  # what cryptography says of a key that needs a password
        raise CertificateProblem(f"{path} is encrypted; write the key without a password, mode 0600") from None
    except (ValueError, UnsupportedAlgorithm) as error:
        raise CertificateProblem(f"{path} holds no private key in PEM form (-----BEGIN PRIVATE KEY-----)") from error
    if not isinstance(key, rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey):
        raise CertificateProblem(f"{path} is no RSA or EC key, and gRPC serves no other; make such a one")
    mode = path.stat().st_mode
    if mode & _BAD_KEY_MODES:
        raise CertificateProblem(f"{path} can be used by other users (mode {stat.S_IMODE(mode):04o}); chmod 600 it")
    return key.public_key()


class ServedCertificate:
    """The certificate that connections get: read again when its files change, as renewals do.

    Files that are bad, or of which only one is renewed yet, change nothing: the last good ones are served on.

    Args:
        files: Where it is. Raises CertificateProblem when they are bad from the start.
    """

    def __init__(self, files: TlsFiles) -> None:
        self._files = files
        self._seen = self._look()
        self.content = read_content(files)
        self._warn_when_soon_over()

    def changed(self) -> TlsContent | None:
        """Returns the new content when there is some; asked at every handshake, by gRPC's threads."""
        seen = self._look()
        if seen == self._seen:
            return None
        self._seen = seen
        try:
            content = read_content(self._files)
        except CertificateProblem as error:
            log.warning("the changed certificate is not used; the one before is served on", error=str(error))
            return None
        self.content = content
        log.info("serving with the changed certificate", cert=str(self._files.cert))
        self._warn_when_soon_over()
        return content

    def _look(self) -> tuple[object, ...]:
        return tuple(_identity(path) for path in (self._files.cert, self._files.key, self._files.client_ca) if path)

    def _warn_when_soon_over(self) -> None:
        end = _certificate(self._files.cert, self.content.cert).not_valid_after_utc
        days = (end - datetime.now(UTC)).days
        if days < SOON_DAYS:
            log.warning("the server's certificate expires soon; renew it", cert=str(self._files.cert), days=days)


def _identity(path: Path) -> object:
    try:
        found = path.stat()
    except OSError as error:
        return error.errno
    return (found.st_ino, found.st_mtime_ns, found.st_size)
