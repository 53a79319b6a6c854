"""Tells who calls from what the connection and the metadata say, and whether that caller may make this call now."""

import ipaddress
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast
from urllib.parse import unquote

import grpc.aio

from unslothd.v1.error_reason_pb2 import ErrorReason
from unslothd.v1.server_info_pb2 import Scope
from unslothd_server.access import callers
from unslothd_server.access.audit import CallRecord
from unslothd_server.access.callers import Caller
from unslothd_server.access.limits import CallerLimits, CallLimits
from unslothd_server.access.scopes import scope_name
from unslothd_server.access.tokens import PREFIX, Token, TokenBook
from unslothd_server.errors import ExhaustedError, PermissionDeniedError, UnauthenticatedError

Context = grpc.aio.ServicerContext[Any, Any]

_HOW = (
    'Send it as metadata "authorization: Bearer <token>"; clients take it from UNSLOTHD_TOKEN. The operator makes one '
    "with `unslothd tokens create`."
)


@dataclass(frozen=True)
class AccessPolicy:
    """Whom a server takes calls from.

    Args:
        identity_required: Nobody is anonymous.
        encrypted: Calls come by TLS.
        certificate_scope: What the holder of a client certificate may do without a token; None = nothing.
    """

    identity_required: bool
    encrypted: bool
    certificate_scope: "Scope.ValueType | None" = None


class Gate:
    """What a call passes before anything of its request is read.

    Args:
        policy: Whom calls are taken from.
        tokens: Tokens that are known.
        limits: What calls may hold, and how many there may be.
    """

    def __init__(self, policy: AccessPolicy, tokens: TokenBook, limits: CallLimits) -> None:
        self._policy = policy
        self._tokens = tokens
        self._longest_seconds = limits.max_deadline_seconds
        self._callers = CallerLimits(limits)

    @contextmanager
    def admit(
        self, record: CallRecord, needed: "Scope.ValueType", context: Context, *, stream: bool
    ) -> Generator[None]:
        """Lets a call in; `record` has its caller then. A stream counts as open inside the block.

        Raises:
            UnslothdError: TOKEN_MISSING, TOKEN_UNKNOWN, TOKEN_EXPIRED, INSUFFICIENT_SCOPE, TOO_MANY_REQUESTS,
                TOO_MANY_STREAMS or DEADLINE_TOO_LONG.
        """
        caller = record.caller = callers.anonymous(_host_of(context.peer()), Scope.SCOPE_UNSPECIFIED)
        try:
            caller = record.caller = self._identify(context)
        finally:  # whoever guesses is counted too
            if caller.limited:
                self._callers.take_request(caller)
        _require(caller, needed, record.rpc)
        self._check_deadline(context)
        if stream and caller.limited:
            with self._callers.stream(caller):
                yield
        else:
            yield

    def exposed(self, context: Context) -> bool:
        """Says whether others could read what the caller sends: it comes from another host, without TLS."""
        return not self._policy.encrypted and _host_of(context.peer()) != callers.LOCAL

    def recheck(self, caller: Caller) -> None:
        """Raises UnauthenticatedError when the caller's token was revoked or expired since the call began."""
        if caller.token is not None and not self._tokens.holds(caller.token):
            raise _expired(caller.token) if caller.token.expired else _unknown()

    def _identify(self, context: Context) -> Caller:
        authorization = [value for key, value in context.invocation_metadata() or () if key == "authorization"]
        if authorization:
            return self._bearer(authorization)
        subject = _certificate_subject(context)
        if subject and self._policy.certificate_scope is not None:
            return callers.of_certificate(subject, self._policy.certificate_scope)
        if self._policy.identity_required:
            raise UnauthenticatedError(
                ErrorReason.ERROR_REASON_TOKEN_MISSING, f"This server asks who calls, and there is no token. {_HOW}"
            )
        return callers.anonymous(_host_of(context.peer()), Scope.SCOPE_ADMIN)

    def _bearer(self, authorization: list[str | bytes]) -> Caller:
        scheme, _, secret = str(authorization[0]).partition(" ")
        if len(authorization) > 1 or scheme.lower() != "bearer" or not secret.startswith(PREFIX):
            raise UnauthenticatedError(
                ErrorReason.ERROR_REASON_TOKEN_UNKNOWN,
                f"The authorization is not one token of this service, which begins with {PREFIX}. {_HOW}",
            )
        token = self._tokens.find(secret)
        if token is None:
            raise _unknown()
        if token.expired:
            raise _expired(token)
        return callers.of_token(token)

    def _check_deadline(self, context: Context) -> None:
        left = cast("float | None", context.time_remaining())  # None without a deadline
        if left is not None and left > self._longest_seconds:
            raise ExhaustedError(
                ErrorReason.ERROR_REASON_DEADLINE_TOO_LONG,
                f"The call asks for {left:.0f} s; the most is {self._longest_seconds:g} s. Ask for less, or set no "
                "deadline: a stream then lasts as long as what it tells of.",
                metadata={
                    "deadline_seconds": f"{left:.0f}",
                    "max_deadline_seconds": f"{self._longest_seconds:g}",
                },
            )


def _require(caller: Caller, needed: "Scope.ValueType", rpc: str) -> None:
    if caller.scope < needed:
        raise PermissionDeniedError(
            ErrorReason.ERROR_REASON_INSUFFICIENT_SCOPE,
            f'{rpc} needs the scope "{scope_name(needed)}", and "{caller.name}" has "{scope_name(caller.scope)}". '
            f"Ask the operator for a token: unslothd tokens create NAME --scope {scope_name(needed)}",
            metadata={"needed_scope": scope_name(needed), "scope": scope_name(caller.scope)},
        )


def _unknown() -> UnauthenticatedError:
    return UnauthenticatedError(
        ErrorReason.ERROR_REASON_TOKEN_UNKNOWN,
        "This server does not know the token: it is of another server, or was revoked. The operator can make a new one "
        "with `unslothd tokens create`.",
    )


def _expired(token: Token) -> UnauthenticatedError:
    assert token.expire_time is not None
    return UnauthenticatedError(
        ErrorReason.ERROR_REASON_TOKEN_EXPIRED,
        f'The token "{token.name}" expired on {token.expire_time:%Y-%m-%d %H:%M} UTC. The operator can revoke it and '
        "make a new one with `unslothd tokens create`.",
        metadata={"expire_time": token.expire_time.isoformat(timespec="seconds")},
    )


def _certificate_subject(context: Context) -> str:
    """The subject of the client's certificate, or its first alternative name; empty = no certificate."""
    found = context.auth_context()
    for key in ("x509_subject", "x509_subject_alternative_name"):
        for value in found.get(key, ()):
            if value:
                return value.decode(errors="replace")
    return ""


@lru_cache(1024)  # the same for all calls of a connection
def _host_of(peer: str) -> str:
    """The IP address of the other end, "local" for this host."""
    kind, _, rest = unquote(peer).partition(":")
    if kind not in {"ipv4", "ipv6"}:
        return callers.LOCAL
    address = ipaddress.ip_address(rest.rpartition(":")[0].strip("[]").partition("%")[0])
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return callers.LOCAL if (mapped or address).is_loopback else str(mapped or address)
