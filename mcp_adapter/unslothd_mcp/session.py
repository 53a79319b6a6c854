"""What every tool gets hold of: the client of the one channel, and the settings. There is no other state."""

from dataclasses import dataclass
from typing import Any, TypeAlias

from mcp.server.mcpserver import Context

import unslothd
from unslothd_mcp.settings import Settings


@dataclass(frozen=True)
class Session:
    """The way to the server, and what agents may ask of it.

    Args:
        client: Opens its channel at the first call.
        settings: What agents may do.
    """

    client: unslothd.AsyncClient
    settings: Settings


Ctx: TypeAlias = Context[Session, Any]


def session_of(ctx: Ctx) -> Session:
    """Returns the session that a call belongs to."""
    return ctx.request_context.lifespan_context
