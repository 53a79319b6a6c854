"""Puts the adapter together: tools, resources and prompts around one client."""

import contextlib
import difflib
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any

from mcp.server.auth.provider import TokenVerifier
from mcp.server.auth.settings import AuthSettings
from mcp.server.mcpserver import MCPServer
from mcp.server.mcpserver.context import Context
from mcp.server.mcpserver.exceptions import ToolError, UnexpectedToolError
from mcp_types import CallToolResult, InputRequiredResult
from pydantic import ValidationError

from unslothd import __version__
from unslothd.errors import FieldViolation
from unslothd_mcp import budgets, prompts, resources, tools_control, tools_files, tools_models, tools_trainings
from unslothd_mcp.catalogue import ToolSpec
from unslothd_mcp.errors import ToolFailure, as_result, invalid
from unslothd_mcp.session import Session
from unslothd_mcp.tasks import TrainingTasks

TOOLS: tuple[ToolSpec, ...] = (
    *tools_models.TOOLS,
    *tools_trainings.TOOLS,
    *tools_control.TOOLS,
    *tools_files.TOOLS,
)
_BY_NAME = {tool.name: tool for tool in TOOLS}
_INSTRUCTIONS = (
    "Fine-tunes language models on the host of an unslothd server. The usual way: unsloth_load_model → "
    "unsloth_prepare_for_training → unsloth_plan_training (dry run) → unsloth_train → unsloth_generate → "
    "unsloth_export_model → unsloth_unload_model. Trainings run on the server and outlive a call: with wait=false "
    "follow them by unsloth_watch_training. Most results say the next_step; a failed call also has code, reason, "
    "message and fields."
)


class Adapter(MCPServer[Session]):
    """The MCP server of one session.

    Args:
        session: The way to the unslothd server, and what agents may do.
        auth: With token_verifier, for HTTP.
        token_verifier: Checks bearer tokens.
    """

    def __init__(
        self, session: Session, *, auth: AuthSettings | None = None, token_verifier: TokenVerifier | None = None
    ) -> None:
        @contextlib.asynccontextmanager
        async def lifespan(_: MCPServer[Session]) -> AsyncGenerator[Session]:
            async with session.client, budgets.kept(session):
                yield session

        read_only = session.settings.read_only
        super().__init__(
            "unslothd",
            title="unslothd: fine-tuning with Unsloth",
            version=__version__,
            instructions=_INSTRUCTIONS,
            lifespan=lifespan,
            extensions=[] if read_only else [TrainingTasks(session)],
            log_level="WARNING",
            auth=auth,
            token_verifier=token_verifier,
        )
        self._offered = {tool.name: tool for tool in TOOLS if tool.read_only or not read_only}
        for tool in self._offered.values():
            self.add_tool(
                tool.function,
                name=tool.name,
                title=tool.title,
                description=tool.description,
                annotations=tool.annotations,
            )
        resources.register(self, session)
        prompts.register(self)

    async def call_tool(
        self, name: str, arguments: dict[str, Any], context: Context[Session, Any] | None = None
    ) -> CallToolResult | InputRequiredResult:
        """Calls a tool; whatever goes wrong becomes a result with structured content."""
        # Agents write null for "leave it at the default".
        given = {key: value for key, value in arguments.items() if value is not None}
        try:
            self._check(name, given)
            return await super().call_tool(name, given, context)
        except ToolFailure as failure:
            return as_result(failure, name, arguments)
        except ToolError as error:
            return as_result(_cause(error), name, arguments)

    def _check(self, name: str, arguments: Mapping[str, Any]) -> None:
        if name not in _BY_NAME:
            raise ToolFailure(
                "UNKNOWN_TOOL", f"There is no tool {name}.{_near(name, list(_BY_NAME))}", code="NOT_FOUND"
            )
        if name not in self._offered:
            raise ToolFailure("READ_ONLY", f"{name} changes something on the server.", code="PERMISSION_DENIED")
        known = _BY_NAME[name].arguments
        unknown = [key for key in arguments if key not in known]
        if unknown:
            raise invalid(*(FieldViolation(key, f"is no argument of {name}.{_near(key, known)}") for key in unknown))


def _cause(error: ToolError) -> BaseException:
    """Returns what a tool raised."""
    cause = error.__cause__
    # Of the arguments it is the agent's mistake; of the result it is ours.
    ours = isinstance(error, UnexpectedToolError) and isinstance(cause, ValidationError)
    return error if ours or cause is None else cause


def _near(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f" Did you mean {near[0]}?" if near else f" There are: {', '.join(known)}."
