"""Serves the adapter by streamable HTTP, with bearer tokens."""

import hmac
import os
import socket
from pathlib import Path

import uvicorn
from mcp.server.auth.provider import AccessToken, TokenVerifier
from mcp.server.auth.settings import AuthSettings

from unslothd_mcp.app import Adapter
from unslothd_mcp.session import Session

PATH = "/mcp"
_LOOPBACK = frozenset({"127.0.0.1", "::1", "localhost"})


class KnownTokens(TokenVerifier):
    """Knows a token by comparing it with all, in a time that tells nothing.

    Args:
        tokens: Those that are let in.
    """

    def __init__(self, tokens: tuple[str, ...]) -> None:
        self._tokens = [token.encode() for token in tokens]

    async def verify_token(self, token: str) -> AccessToken | None:
        """Returns who it is, or None."""
        found = [number for number, known in enumerate(self._tokens) if hmac.compare_digest(known, token.encode())]
        return AccessToken(token=token, client_id=f"token-{found[0] + 1}", scopes=[]) if found else None


def read_tokens(file: Path) -> tuple[str, ...]:
    """Returns the tokens of a file, one a line; empty lines and lines that begin with # are left out.

    Raises:
        ValueError: There is none. OSError: It cannot be read.
    """
    lines = (line.strip() for line in file.read_text().splitlines())
    tokens = tuple(line for line in lines if line and not line.startswith("#"))
    if not tokens:
        raise ValueError(f"{file} holds no token: write one a line")
    return tokens


def is_loopback(host: str) -> bool:
    """True when only this machine can reach the address."""
    return host in _LOOPBACK


async def serve(session: Session, host: str, port: int, tokens: tuple[str, ...]) -> None:
    """Serves until the process is told to end.

    Args:
        session: The way to the unslothd server.
        host: Address to listen on.
        port: 0 = a free one, which is printed.
        tokens: Those that are let in; empty = everybody.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, port), family=family) as listening:
        shown = f"[{host}]" if ":" in host else host
        url = f"http://{shown}:{listening.getsockname()[1]}"
        adapter = _guarded(session, url, tokens) if tokens else Adapter(session)
        config = uvicorn.Config(adapter.streamable_http_app(streamable_http_path=PATH, host=host), log_level="warning")
        os.write(1, f"unslothd-mcp is serving on {url}{PATH}\n".encode())
        await uvicorn.Server(config).serve(sockets=[listening])


def _guarded(session: Session, url: str, tokens: tuple[str, ...]) -> Adapter:
    # The tokens come from a file, so there is no authorization server to tell clients of.
    auth = AuthSettings.model_validate({"issuer_url": url, "resource_server_url": None})
    return Adapter(session, auth=auth, token_verifier=KnownTokens(tokens))
