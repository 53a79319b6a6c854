"""The MCP tasks extension (SEP-2663): for hosts that speak it, unsloth_train is a task, and the training id its id.

The server's trainings are the tasks, so there is nothing to keep here: a host that comes back next week, to another
adapter, finds its task.
"""

import datetime
from collections.abc import Sequence
from typing import Any

from mcp.server.context import CallNext, HandlerResult, ServerRequestContext
from mcp.server.extension import Extension, MethodBinding
from mcp.server.mcpserver.server import require_client_extension
from mcp.shared.exceptions import MCPError
from mcp_types import (
    INVALID_PARAMS,
    CallToolRequestParams,
    CallToolResult,
    CancelTaskRequestParams,
    GetTaskRequestParams,
    RequestParams,
    TextContent,
)
from mcp_types.version import MODERN_PROTOCOL_VERSIONS
from pydantic import TypeAdapter

import unslothd
from unslothd_mcp import results
from unslothd_mcp.errors import as_result
from unslothd_mcp.plain import Plain, moment
from unslothd_mcp.session import Session
from unslothd_mcp.training_calls import result_of

EXTENSION = "io.modelcontextprotocol/tasks"
_TOOL = "unsloth_train"
_POLL_MS = 2000
_TRAINED: TypeAdapter[results.Trained] = TypeAdapter(results.Trained)


class UpdateTaskParams(RequestParams):
    """Answers to what a task asks; trainings ask nothing."""

    task_id: str
    input_responses: dict[str, Any]


class TrainingTasks(Extension):
    """Serves trainings as tasks.

    Args:
        session: The way to the server.
    """

    identifier = EXTENSION

    def __init__(self, session: Session) -> None:
        self._client = session.client
        self._session = session

    def methods(self) -> Sequence[MethodBinding]:
        """Returns the methods of the extension."""
        modern = frozenset(MODERN_PROTOCOL_VERSIONS)
        return (
            MethodBinding("tasks/get", GetTaskRequestParams, self._get, modern),
            MethodBinding("tasks/update", UpdateTaskParams, self._update, modern),
            MethodBinding("tasks/cancel", CancelTaskRequestParams, self._cancel, modern),
        )

    async def intercept_tool_call(
        self, params: CallToolRequestParams, ctx: ServerRequestContext[Any, Any], call_next: CallNext
    ) -> HandlerResult:
        """Answers unsloth_train with a task, unless the call says wait=false or the host does not speak tasks."""
        arguments = params.arguments or {}
        if params.name != _TOOL or arguments.get("wait") is False or not _speaks_tasks(ctx):
            return await call_next(ctx)
        # The handler is invoked with this very object (see Extension.intercept_tool_call).
        params.arguments = {**arguments, "wait": False}
        result = await call_next(ctx)
        if not isinstance(result, CallToolResult) or result.is_error or result.structured_content is None:
            return result
        training = await self._client.get_training(result.structured_content["training_id"])
        return {"resultType": "task", **_task(training)}

    async def _get(self, ctx: ServerRequestContext[Any, Any], params: GetTaskRequestParams) -> HandlerResult:
        training = await self._training(ctx, params.task_id)
        task = _task(training)
        return task | ({"result": await self._result(training)} if task["status"] == "completed" else {})

    async def _update(self, ctx: ServerRequestContext[Any, Any], params: UpdateTaskParams) -> HandlerResult:
        await self._training(ctx, params.task_id)
        return {}

    async def _cancel(self, ctx: ServerRequestContext[Any, Any], params: CancelTaskRequestParams) -> HandlerResult:
        await self._training(ctx, params.task_id)
        await self._client.cancel(params.task_id, save_checkpoint=True)
        return {}

    async def _training(self, ctx: ServerRequestContext[Any, Any], task_id: str) -> unslothd.Training:
        require_client_extension(ctx, EXTENSION)
        try:
            return await self._client.get_training(task_id)
        except unslothd.errors.NotFound as error:
            raise MCPError(code=INVALID_PARAMS, message=error.message, data={"taskId": task_id}) from error

    async def _result(self, training: unslothd.Training) -> Plain:
        """Returns the result that the call would have had; that of a failed training is one with isError."""
        try:
            trained = await result_of(self._session, training)
        except unslothd.UnslothdError as error:
            result = as_result(error, _TOOL, {})
        else:
            text = TextContent(type="text", text=_TRAINED.dump_json(trained, indent=2).decode())
            result = CallToolResult(content=[text], structured_content=dict(trained))
        return result.model_dump(mode="json", by_alias=True, exclude_none=True)


def _speaks_tasks(ctx: ServerRequestContext[Any, Any]) -> bool:
    capabilities = ctx.session.client_capabilities
    declared = capabilities.extensions if capabilities is not None else None
    return ctx.protocol_version in MODERN_PROTOCOL_VERSIONS and EXTENSION in (declared or {})


def _task(training: unslothd.Training) -> Plain:
    state = results.training_state(training)
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return {
        "taskId": training.training_id,
        "status": {"succeeded": "completed", "failed": "completed", "cancelled": "cancelled"}.get(state, "working"),
        "statusMessage": f"{state}, step {training.step} of {training.total_steps or 'as yet unknown'}",
        "createdAt": moment(training.create_time),
        "lastUpdatedAt": moment(training.end_time) if training.HasField("end_time") else now,
        "ttlMs": None,
        "pollIntervalMs": _POLL_MS,
    }
