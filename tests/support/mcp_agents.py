"""An MCP host as tests play it: the adapter in a process of its own, the SDK's client, results taken apart."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import httpx2
from mcp.client import Client
from mcp.client.stdio import StdioServerParameters, stdio_client
from mcp.client.streamable_http import streamable_http_client
from mcp_types import CallToolResult

import unslothd
from doubles.fake_worker import fake_row
from doubles.gates import StepGate
from support.running_server import STOP_SECONDS
from support.waiting import wait_until
from unslothd_mcp.app import Adapter
from unslothd_mcp.session import Session
from unslothd_mcp.settings import Settings

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

    @asynccontextmanager
    async def calling(self, tool: str, **arguments: Any) -> AsyncIterator[None]:
        """Calls a tool in the background; leaving cancels the call, as a host does on "stop"."""
        async with anyio.create_task_group() as group:
            group.start_soon(partial(self.result, tool, **arguments))
            yield
            group.cancel_scope.cancel()


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


@contextmanager
def http_adapter(target: str, token_file: Path) -> Iterator[str]:
    """Starts an adapter that serves by HTTP, and ends it; yields its URL.

    Args:
        target: The unslothd server.
        token_file: Its bearer tokens.
    """
    start = adapter(target, "--http", "127.0.0.1:0", "--http-token-file", str(token_file))
    with subprocess.Popen([start.command, *start.args], env=start.env, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().split()[-1]
        finally:
            process.terminate()
            ended = process.wait(STOP_SECONDS)
        assert ended in (0, -signal.SIGTERM)


@asynccontextmanager
async def http_agent(url: str, token: str, mode: str) -> AsyncIterator[Agent]:
    """Connects an agent to an adapter by HTTP."""
    headers = {"Authorization": f"Bearer {token}"}
    async with (
        httpx2.AsyncClient(headers=headers, timeout=CALL_SECONDS) as http,
        Client(streamable_http_client(url, http_client=http), mode=mode) as client,
    ):
        yield Agent(client)


@asynccontextmanager
async def agent_inside(target: str, mode: str = "auto", *, client: Any = None, **settings: Any) -> AsyncIterator[Agent]:
    """Connects an agent to an adapter in this process, which starts at once.

    Args:
        target: The unslothd server.
        mode: As for `agent`.
        client: Options of the SDK's client.
        settings: Of the adapter.
    """
    adapter = Adapter(Session(unslothd.AsyncClient(target), Settings(**settings)))
    async with Client(adapter, mode=mode, **(client or {})) as connected:
        yield Agent(connected)


async def reached(gate: StepGate, step: int) -> None:
    """Returns once a training waits at this step; fails after a bounded time."""
    await anyio.to_thread.run_sync(wait_until, lambda: gate.is_reached(step))


def scripted_row(**knobs: Any) -> dict[str, Any]:
    """Returns a row that tells the scripted engine what to do (see `fake_worker.py`)."""
    return json.loads(fake_row(**knobs))
