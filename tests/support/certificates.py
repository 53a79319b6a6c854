"""Certificates of a test: an authority, and what it signs for servers and clients."""

import datetime
import ipaddress
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

_DAY = datetime.timedelta(days=1)


class Authority:
    """A certificate authority whose files lie in a folder.

    Args:
        folder: Where every file of it goes; it is made.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = _name(f"test authority {folder.name}")
        usage = x509.KeyUsage(False, False, False, False, False, True, True, False, False)
        self._certificate = (
            _dated(self._name, self._name, self._key)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(usage, critical=True)
            .sign(self._key, hashes.SHA256())
        )
        self.ca = self._written("ca.pem", self._certificate.public_bytes(serialization.Encoding.PEM))

    def server(
        self,
        name: str = "server",
        hosts: tuple[str, ...] = ("127.0.0.1", "localhost"),
        starts_in: datetime.timedelta = -_DAY,
    ) -> tuple[Path, Path]:
        """Makes a server's certificate and key for these host names and addresses; returns the paths of both.

        The certificate is good for 30 days.
        """
        names = x509.SubjectAlternativeName([_host(host) for host in hosts])
        return self._signed(name, names, server=True, starts_in=starts_in)

    def client(self, name: str) -> tuple[Path, Path]:
        """Makes a client's certificate with this common name, and its key; returns the paths of both."""
        return self._signed(name, x509.SubjectAlternativeName([x509.DNSName(name)]), server=False)

    def _signed(
        self,
        name: str,
        names: x509.SubjectAlternativeName,
        *,
        server: bool,
        starts_in: datetime.timedelta = -_DAY,
    ) -> tuple[Path, Path]:
        key = ec.generate_private_key(ec.SECP256R1())
        usage = ExtendedKeyUsageOID.SERVER_AUTH if server else ExtendedKeyUsageOID.CLIENT_AUTH
        certificate = (
            _dated(_name(name), self._name, key, starts_in)
            .add_extension(names, critical=False)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        unencrypted = serialization.NoEncryption()
        pem, pkcs8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
        return (
            self._written(f"{name}.pem", certificate.public_bytes(pem)),
            self._written(f"{name}.key", key.private_bytes(pem, pkcs8, unencrypted)),
        )

    def _written(self, name: str, content: bytes) -> Path:
        path = self._folder / name
        path.touch(mode=0o600)
        path.write_bytes(content)
        return path


def _dated(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, starts_in: datetime.timedelta = -_DAY
) -> x509.CertificateBuilder:
    start = datetime.datetime.now(datetime.UTC) + starts_in
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(key.public_key())
    builder = builder.serial_number(x509.random_serial_number())
    return builder.not_valid_before(start).not_valid_after(start + 30 * _DAY)


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)
