"""A real server as operators run it for other hosts: TLS, and tokens for its callers."""

from pathlib import Path

from support.certificates import Authority
from support.running_server import RunningServer
from unslothd.v1.server_info_pb2 import Scope
from unslothd_server.access.tokens import TokenFile

SCOPES = ("read", "train", "admin")


class SecureServer(RunningServer):
    """Asks every caller for a token, over TLS; with scripted workers.

    Args:
        folder: Empty; the server's folders and the certificates go there.

    Attributes:
        authority: Whose certificate the server shows.
        tokens: Scope → a token of it.
    """

    def __init__(self, folder: Path) -> None:
        self.authority = Authority(folder / "authority")
        certificate, key = self.authority.server()
        arguments = ("--tls-cert", str(certificate), "--tls-key", str(key), "--require-identity", "yes")
        super().__init__(folder, fake_workers=True, arguments=arguments)
        file = TokenFile(self.home)
        self.tokens = {scope: file.create(scope, Scope.Value(f"SCOPE_{scope.upper()}"), None) for scope in SCOPES}
