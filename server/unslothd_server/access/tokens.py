"""Tokens: named secrets with a scope, kept as hashes in <home>/tokens.json; made and revoked by `unslothd tokens`."""

import fcntl
import hashlib
import hmac
import json
import os
import re
import secrets
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

import structlog

from unslothd.v1.server_info_pb2 import Scope
from unslothd_server.access.scopes import scope_name, scope_of
from unslothd_server.app.files import write_json

log = structlog.get_logger()

# Secret scanners find tokens by this: usd_ and 64 hexadecimal digits.
PREFIX = "usd_"
_SECRET_BYTES = 32
STATE_VERSION = 1
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")


class TokensError(Exception):
    """A token cannot be made, found or read; the text says what to do next."""


@dataclass(frozen=True)
class Token:
    """One token as it is kept: without its secret.

    Args:
        name: Whom or what it is for, as the audit log has it.
        sha256: Of the whole token, 64 hexadecimal digits. The token is 256 random bits, which nobody finds by trying,
            so a slow or salted hash would add nothing.
        scope: What its bearer may do.
        create_time: When it was made.
        expire_time: From when on it is refused; None = never.
    """

    name: str
    sha256: str
    scope: "Scope.ValueType"
    create_time: datetime
    expire_time: datetime | None

    @property
    def expired(self) -> bool:
        """Its time is over."""
        return self.expire_time is not None and self.expire_time <= datetime.now(UTC)


class TokenFile:
    """The tokens of a home; changes are whole or not at all, one process at a time.

    Args:
        home: The server's folder for state.
    """

    def __init__(self, home: Path) -> None:
        self.path = home / "tokens.json"

    @classmethod
    def of(cls, home: Path) -> Self:
        """The tokens of a home that this user may change; the folder is made when it is not there yet.

        Raises:
            TokensError: The home is another user's: the server could not read a file that is ours.
            OSError: It cannot be made.
        """
        home.mkdir(parents=True, exist_ok=True, mode=0o700)
        if home.stat().st_uid != os.geteuid():
            owner = home.owner()
            raise TokensError(f"{home} belongs to {owner}, the user of the server: sudo -u {owner} unslothd tokens …")
        return cls(home)

    def read(self) -> list[Token]:
        """Returns all tokens, oldest first. Raises TokensError when the file is damaged, OSError when unreadable."""
        try:
            text = self.path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return []
        try:
            content = json.loads(text)
            if content["version"] != STATE_VERSION:
                raise TokensError(
                    f"{self.path} is of version {content['version']}; this unslothd reads {STATE_VERSION}."
                )
            return [_token_from(each) for each in content["tokens"]]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise TokensError(
                f"{self.path} is damaged ({error!r}). Put a backup in its place, or remove it and make new tokens."
            ) from error

    def create(self, name: str, scope: "Scope.ValueType", expire_time: datetime | None) -> str:
        """Makes a token; returns it. It is kept nowhere.

        Raises:
            TokensError: The name is taken or cannot be one, or the file is damaged.
            OSError: The file cannot be written.
        """
        if not _NAME.fullmatch(name):
            raise TokensError(f'"{name}" cannot be a name: use 1 to 64 letters, digits and . _ @ -')
        secret = PREFIX + secrets.token_hex(_SECRET_BYTES)
        with self._changing() as tokens:
            if any(token.name == name for token in tokens):
                raise TokensError(f'There is a token "{name}" already. Revoke it first, or choose another name.')
            tokens.append(Token(name, _sha256(secret), scope, datetime.now(UTC), expire_time))
        return secret

    def revoke(self, name: str) -> None:
        """Removes a token; the server refuses it from then on. Raises TokensError, OSError."""
        with self._changing() as tokens:
            kept = [token for token in tokens if token.name != name]
            if len(kept) == len(tokens):
                known = ", ".join(token.name for token in tokens) or "none"
                raise TokensError(f'There is no token "{name}". Those that there are: {known}.')
            tokens[:] = kept

    @contextmanager
    def _changing(self) -> Generator[list[Token]]:
        lock = os.open(self.path.with_name("tokens.lock"), os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            tokens = self.read()
            yield tokens
            kept = [{"sha256": token.sha256, **told(token)} for token in tokens]
            write_json(self.path, {"version": STATE_VERSION, "tokens": kept})
        finally:
            os.close(lock)


class TokenBook:
    """The tokens as a server looks at them: a change of the file counts from the next call on.

    Args:
        file: Where they are.
    """

    def __init__(self, file: TokenFile) -> None:
        self._file = file
        self._seen: object = None
        self._tokens: Sequence[Token] = ()

    def find(self, secret: str) -> Token | None:
        """Returns the token that this is, expired or not.

        It takes as long for a wrong one as for a right one: every hash is compared, each in constant time.
        """
        sha256 = _sha256(secret)
        found = None
        for token in self._current():
            if hmac.compare_digest(token.sha256, sha256):
                found = token
        return found

    def holds(self, token: Token) -> bool:
        """The token is neither revoked nor expired."""
        return token in self._current() and not token.expired

    def __len__(self) -> int:
        """How many there are."""
        return len(self._current())

    def _current(self) -> Sequence[Token]:
        """Reads the file again when it has changed. One that cannot be read lets nobody in."""
        try:
            stat = self._file.path.stat()
            seen = (stat.st_ino, stat.st_mtime_ns, stat.st_size)
        except FileNotFoundError:
            seen = None
        except OSError as error:
            seen = error.errno
        if seen != self._seen:
            self._seen = seen
            try:
                self._tokens = self._file.read()
            except (TokensError, OSError) as error:
                log.error("no token is accepted", error=str(error))  # noqa: TRY400 - the text says all
                self._tokens = ()
        return self._tokens


def _sha256(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def told(token: Token) -> dict[str, object]:
    """What may be told of a token, for JSON."""
    return {
        "name": token.name,
        "scope": scope_name(token.scope),
        "create_time": token.create_time.isoformat(timespec="seconds"),
        "expire_time": token.expire_time and token.expire_time.isoformat(timespec="seconds"),
    }


def _token_from(content: dict[str, Any]) -> Token:
    expire_time = content["expire_time"]
    return Token(
        name=content["name"],
        sha256=content["sha256"],
        scope=scope_of(content["scope"]),
        create_time=datetime.fromisoformat(content["create_time"]),
        expire_time=datetime.fromisoformat(expire_time) if expire_time else None,
    )
