"""Callers: who is on the other end of a call, how that is known, and what it may do."""

from contextvars import ContextVar
from dataclasses import dataclass

from unslothd.v1.server_info_pb2 import Caller as CallerMessage
from unslothd.v1.server_info_pb2 import Scope
from unslothd_server.access.tokens import Token

LOCAL = "local"
# The caller of the call that runs now.
CURRENT: ContextVar["Caller"] = ContextVar("caller")


@dataclass(frozen=True)
class Caller:
    """Who calls.

    Args:
        name: Name of the token, subject of the certificate, address, or "local" for an anonymous one of this host.
        kind: How that is known.
        scope: What it may do; UNSPECIFIED = nothing, because it could not be told who it is.
        token: The token, of a caller that has one.
    """

    name: str
    kind: "CallerMessage.Kind.ValueType"
    scope: "Scope.ValueType"
    token: Token | None = None

    @property
    def limited(self) -> bool:
        """How much it may call is limited. Not so for anonymous callers of this host: they have the host anyway."""
        return self.name != LOCAL or self.kind != CallerMessage.KIND_ANONYMOUS

    def to_message(self) -> CallerMessage:
        """As the contract has it."""
        return CallerMessage(name=self.name, kind=self.kind, scope=self.scope)


def of_token(token: Token) -> Caller:
    """The bearer of a token."""
    return Caller(token.name, CallerMessage.KIND_TOKEN, token.scope, token)


def of_certificate(subject: str, scope: "Scope.ValueType") -> Caller:
    """The holder of a client certificate."""
    return Caller(subject, CallerMessage.KIND_CERTIFICATE, scope)


def anonymous(address: str, scope: "Scope.ValueType") -> Caller:
    """Somebody at an address, or `LOCAL`."""
    return Caller(address, CallerMessage.KIND_ANONYMOUS, scope)
