"""Certificates and tokens of the cases with TLS: what the server shows, and what a case gives to its client."""

from pathlib import Path

import grpc

from support.certificates import Authority
from support.running_server import RunningServer
from support.secure_server import SecureServer


class Certificates:
    """An authority that the server's certificate is of, and a stranger; made when a case asks for them.

    Args:
        folder: Where the files go.
        real: The server of cases without a script, whose authority and tokens are taken if it has them.
    """

    def __init__(self, folder: Path, real: RunningServer) -> None:
        self._folder = folder
        self._authority = real.authority if isinstance(real, SecureServer) else None
        self._tokens = real.tokens if isinstance(real, SecureServer) else {}

    @property
    def authority(self) -> Authority:
        """Whose certificate the server shows."""
        if self._authority is None:
            self._authority = Authority(self._folder / "authority")
        return self._authority

    def server(self, kind: str) -> grpc.ServerCredentials | None:
        """Returns what a server shows: "trusted", "elsewhere" (made for another name) or "mutual" (asks for the
        client's, too); None for "plain" and "".
        """
        if kind in {"", "plain"}:
            return None
        hosts = ("elsewhere.example",) if kind == "elsewhere" else ("127.0.0.1",)
        certificate, key = self.authority.server(hosts=hosts)
        pair = (key.read_bytes(), certificate.read_bytes())
        if kind == "mutual":
            return grpc.ssl_server_credentials([pair], self.authority.ca.read_bytes(), require_client_auth=True)
        return grpc.ssl_server_credentials([pair])

    def names(self) -> dict[str, str]:
        """What a case can give to its client: paths, and a token of each scope."""
        certificate, key = self.authority.client("client")
        stranger = Authority(self._folder / "stranger")
        return {
            "ca": str(self.authority.ca),
            "stranger": str(stranger.ca),
            "client_cert": str(certificate),
            "client_key": str(key),
            **{f"{scope}_token": token for scope, token in self._tokens.items()},
        }
