"""An MCP host as tests play it: the adapter in a process of its own, the SDK's client, and calls that take results apart."""

import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from mcp.client import Client
from mcp.client.stdio import StdioServerParameters, stdio_client
from mcp_types import CallToolResult

CALL_SECONDS = 120.0


class Agent:
    """What an agent does with a connection.

    Args:
        client: The connection.
    """

    def __init__(self, client: Client) -> None:
        self.client = client
        self.progress: list[tuple[float, float | None, str | None]] = []

    async def result(self, tool: str, **arguments: Any) -> CallToolResult:
        """Calls a tool; keeps the progress."""

        async def keep(progress: float, total: float | None, message: str | None) -> None:
            self.progress.append((progress, total, message))

        return await self.client.call_tool(tool, arguments, progress_callback=keep, read_timeout_seconds=CALL_SECONDS)

    async def call(self, tool: str, **arguments: Any) -> dict[str, Any]:
        """Calls a tool that must succeed and returns its structured content."""
        result = await self.result(tool, **arguments)
        assert not result.is_error, result.structured_content or result.content
        assert result.structured_content is not None
        return result.structured_content

    async def error(self, tool: str, **arguments: Any) -> dict[str, Any]:
        """Calls a tool that must fail and returns its structured content."""
        result = await self.result(tool, **arguments)
        assert result.is_error, result.structured_content
        assert result.structured_content is not None, result.content
        assert {"code", "reason", "message", "fields", "next_step"} <= set(result.structured_content)
        return result.structured_content


def adapter(target: str, *arguments: str) -> StdioServerParameters:
    """Returns how a host starts the adapter."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return StdioServerParameters(
        command=sys.executable, args=["-m", "unslothd_mcp", "--target", target, *arguments], env=environment
    )


@asynccontextmanager
async def agent(target: str, *arguments: str, mode: str = "auto", **options: Any) -> AsyncIterator[Agent]:
    """Connects an agent to an adapter of its own, by stdio.

    Args:
        target: The unslothd server.
        arguments: Of the adapter.
        mode: "legacy" = with the handshake; "auto" = stateless where it can.
        options: Of the SDK's client.
    """
    async with Client(stdio_client(adapter(target, *arguments)), mode=mode, **options) as client:
        yield Agent(client)
