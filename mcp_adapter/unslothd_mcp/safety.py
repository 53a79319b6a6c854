"""Calls that destroy something ask first: the user, where the host can ask; else by a value bound to what was shown.

The value is a digest of what would be lost, worked out anew at each call: nothing is kept in between, and a yes to one
thing is no yes to another.
"""

import hashlib
import json
from dataclasses import dataclass
from typing import Annotated, TypeAlias

from mcp.server.elicitation import AcceptedElicitation, ElicitationResult
from mcp.server.mcpserver import Elicit
from mcp_types.version import MODERN_PROTOCOL_VERSIONS
from pydantic import BaseModel, Field

from unslothd_mcp.errors import ToolFailure
from unslothd_mcp.plain import Plain
from unslothd_mcp.session import Ctx

_DIGEST_CHARACTERS = 16

Confirm: TypeAlias = Annotated[
    str | None,
    Field(description="The value of `confirm` from the answer that showed what would be lost. Default null."),
]


class Approval(BaseModel):
    """What the user is asked."""

    go_ahead: bool = Field(description="Yes: do it, and lose what is named.")


Asked: TypeAlias = ElicitationResult[Approval]


@dataclass(frozen=True)
class Loss:
    """What a call would destroy.

    Args:
        text: For people, one or two sentences.
        subject: The same for programs; a yes counts for exactly this.
    """

    text: str
    subject: Plain

    @property
    def digest(self) -> str:
        """Names exactly this loss."""
        canonical = json.dumps(self.subject, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()[:_DIGEST_CHARACTERS]


async def approval(ctx: Ctx, loss: Loss | None, confirm: str | None) -> Elicit[Approval] | Approval:
    """Returns a yes, or the question to the user.

    Args:
        ctx: The call.
        loss: What it would destroy; None = nothing.
        confirm: As the agent gave it.

    Raises:
        ToolFailure: CONFIRMATION_NEEDED where the host cannot ask; CONFIRMATION_STALE for another loss.
    """
    if loss is None or confirm == loss.digest:
        return Approval(go_ahead=True)
    if confirm is None and _host_asks(ctx):
        return Elicit(f"{loss.text} Go ahead?", Approval)
    reason = "CONFIRMATION_NEEDED" if confirm is None else "CONFIRMATION_STALE"
    raise ToolFailure(reason, loss.text, details={"confirm": loss.digest, "would_lose": loss.subject})


def require(asked: Asked) -> None:
    """Returns after a yes.

    Raises:
        ToolFailure: DECLINED.
    """
    if not (isinstance(asked, AcceptedElicitation) and asked.data.go_ahead):
        raise ToolFailure("DECLINED", "The user was asked and did not agree; nothing was done.", code="ABORTED")


def _host_asks(ctx: Ctx) -> bool:
    """True when the host can show a form to its user, and there is a way to ask it."""
    capabilities = ctx.client_capabilities
    elicitation = capabilities.elicitation if capabilities is not None else None
    if elicitation is None or (elicitation.form is None and elicitation.url is not None):
        return False
    return ctx.protocol_version in MODERN_PROTOCOL_VERSIONS or ctx.session.can_send_request
