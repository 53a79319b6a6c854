"""Failed tool calls as results an agent can act on: is_error, with {code, reason, message, fields, next_step}.

Everything that a tool raises comes through `as_result`; what to do next is in `next_steps.py`, by reason.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from mcp.server.mcpserver.exceptions import ToolError, UnexpectedToolError
from mcp_types import CallToolResult, TextContent
from pydantic import ValidationError

import unslothd
from unslothd import errors
from unslothd_mcp.next_steps import next_step
from unslothd_mcp.plain import Plain

_LOG = logging.getLogger(__name__)
_REDACTED = "[token]"


class ToolFailure(Exception):
    """A call that the adapter itself refuses.

    Args:
        reason: Stable name of the cause.
        message: What is wrong.
        code: gRPC status code that fits.
        next_step: Which tool to call next, and how; empty = what `next_steps` has for the reason.
        fields: Wrong arguments.
        details: More for the structured content.
    """

    def __init__(
        self,
        reason: str,
        message: str,
        *,
        code: str = "FAILED_PRECONDITION",
        next_step: str = "",
        fields: Sequence[errors.FieldViolation] = (),
        details: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.code = code
        self.next_step = next_step
        self.fields = tuple(fields)
        self.details = dict(details or {})


def invalid(*fields: errors.FieldViolation) -> ToolFailure:
    """Returns the failure for wrong arguments, all of them at once."""
    text = "; ".join(f"{each.field}: {each.description}" for each in fields)
    return ToolFailure("INVALID_FIELD", text, code="INVALID_ARGUMENT", fields=fields)


def as_result(error: BaseException, tool: str, arguments: Mapping[str, Any]) -> CallToolResult:
    """Returns the result of a call that ended with an error.

    Args:
        error: As the tool raised it.
        tool: Name of the tool.
        arguments: As the agent gave them; a token among them is removed from every text.
    """
    found = _described(error, tool)
    token = arguments.get("token")
    content: Plain = _without(found, token) if isinstance(token, str) and token else found
    text = json.dumps(content, ensure_ascii=False, indent=1)
    return CallToolResult(content=[TextContent(type="text", text=text)], structured_content=content, is_error=True)


def _described(error: BaseException, tool: str) -> Plain:
    match error:
        case ToolFailure():
            step = error.next_step or next_step(error.reason, error.code, tool)
            return _content(error.code, error.reason, error.message, error.fields, step) | error.details
        case unslothd.UnslothdError():
            return _of_server(error, tool)
        case ValidationError():
            return _described(invalid(*_violations(error)), tool)
        case ToolError() if not isinstance(
            error, UnexpectedToolError
        ):  # of the SDK: an answer of the user is no answer
            return _described(ToolFailure("ELICITATION", str(error), code="INVALID_ARGUMENT"), tool)
        case TypeError():  # of the client: arguments that no request can hold
            return _described(ToolFailure("INVALID_FIELD", str(error), code="INVALID_ARGUMENT"), tool)
        case _:
            _LOG.error("%s raised an unexpected exception", tool, exc_info=error)
            text = f"A bug in the adapter ended {tool}; its log (stderr) has the cause."
            return _content("INTERNAL", "ADAPTER", text, (), next_step("ADAPTER", "INTERNAL", tool))


def _of_server(error: unslothd.UnslothdError, tool: str) -> Plain:
    step = next_step(error.reason, error.code.name, tool)
    content = _content(error.code.name, error.reason, error.message, error.field_violations, step)
    if isinstance(error, unslothd.TrainingFailed | unslothd.TrainingCancelled):
        content["training_id"] = error.training_id
    if error.retry_after:
        content["retry_after_seconds"] = error.retry_after
    return content | ({"metadata": error.metadata} if error.metadata else {})


def _content(code: str, reason: str, message: str, fields: Sequence[errors.FieldViolation], step: str) -> Plain:
    named = [{"field": each.field, "description": each.description} for each in fields]
    return {"code": code, "reason": reason or code, "message": message, "fields": named, "next_step": step}


def _violations(error: ValidationError) -> list[errors.FieldViolation]:
    # Without the rejected values: they may be secrets.
    found = error.errors(include_url=False, include_context=False, include_input=False)
    return [errors.FieldViolation(".".join(map(str, each["loc"])), each["msg"]) for each in found]


def _without(content: Any, token: str) -> Any:
    match content:
        case str():
            return content.replace(token, _REDACTED)
        case dict():
            return {key: _without(value, token) for key, value in content.items()}  # pyright: ignore[reportUnknownVariableType]
        case list():
            return [_without(each, token) for each in content]  # pyright: ignore[reportUnknownVariableType]
        case _:
            return content
