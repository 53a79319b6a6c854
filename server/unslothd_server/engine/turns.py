"""Turns and tools of a conversation, in whatever style the rows have them, made into what chat templates take."""

import json
from typing import Any

Turn = dict[str, Any]
Tool = dict[str, Any]

ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "bard": "assistant",
    "bing": "assistant",
    "function": "tool",
    "observation": "tool",
}


class BadTurnsError(ValueError):
    """The turns or tools of a row cannot be used; the text says why."""


def plain_turns(value: object, column: str) -> list[Turn]:
    """Turns as {role, content}, with tool_calls and other keys where they have them.

    Args:
        value: The column's value: {role, content} or {from, value} turns.
        column: Its name, for errors.

    Raises:
        BadTurnsError: Not a list of turns, or a turn without a usable role, content or call.
    """
    if not isinstance(value, list | tuple):
        raise BadTurnsError(f'"{column}" is {_kind(value)}, but must be a list of turns')
    if not value:
        raise BadTurnsError(f'"{column}" has no turns')
    return [_plain_turn(turn, number) for number, turn in enumerate(value, start=1)]


def plain_tools(value: object, column: str) -> list[Tool] | None:
    """Tools as a list of JSON schemas; None when the row has none.

    Args:
        value: The column's value: a list of schemas, each an object or its JSON text, or the JSON text of the list.
        column: Its name, for errors.

    Raises:
        BadTurnsError: It is something else, or is not JSON.
    """
    value = _from_json(value, f'"{column}"')
    if value is None or value in ([], ""):
        return None
    if not isinstance(value, list):
        raise BadTurnsError(f'"{column}" is {_kind(value)}, but must be a list of tools or its JSON text')
    tools = [_without_nulls(_from_json(tool, f'tool {number} of "{column}"')) for number, tool in enumerate(value, 1)]
    for number, tool in enumerate(tools, start=1):
        if not isinstance(tool, dict):
            raise BadTurnsError(f'tool {number} of "{column}" is {_kind(tool)}, but must be a JSON schema')
    return tools


def says_nothing(turn: Turn) -> bool:
    """True for a turn with neither text nor a call: there is nothing in it to learn."""
    texts = [value for key, value in turn.items() if key != "role" and isinstance(value, str)]
    return not turn.get("tool_calls") and not any(text.strip() for text in texts)


def _plain_turn(turn: object, number: int) -> Turn:
    if not isinstance(turn, dict):
        raise BadTurnsError(f"turn {number} is {_kind(turn)}, but must have role and content (or from and value)")
    # Columnar files fill the keys that a turn does not have with None.
    known = {key: value for key, value in turn.items() if value is not None}
    role = known.pop("role", None) or known.pop("from", None)
    content = known.pop("content", None)
    if content is None:
        content = known.pop("value", None)
    if not isinstance(role, str) or not role:
        raise BadTurnsError(f"turn {number} has no role (or from)")
    if "tool_calls" in known:
        known["tool_calls"] = _plain_calls(known["tool_calls"], number)
        content = "" if content is None else content
    return {"role": ROLES.get(role.lower(), role), "content": _plain_content(content, number), **known}


def _plain_calls(calls: object, number: int) -> list[Any]:
    """Calls with their arguments as an object, which is what chat templates write as JSON themselves."""
    calls = _from_json(calls, f"tool_calls of turn {number}")
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise BadTurnsError(f"tool_calls of turn {number} is {_kind(calls)}, but must be a list of calls")
    return [_plain_call(_without_nulls(call), number) for call in calls]


def _plain_call(call: dict[str, Any], number: int) -> dict[str, Any]:
    function = call.get("function")
    if isinstance(function, dict):
        return {**call, "function": _plain_call(function, number)}
    if not isinstance(call.get("name"), str):
        raise BadTurnsError(f"a call of turn {number} has no name")
    arguments = call.get("arguments", {})
    return {**call, "arguments": _from_json(arguments, f"the arguments of a call of turn {number}")}


def _plain_content(content: object, number: int) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        texts = [part.get("text") if isinstance(part, dict) else part for part in content]
        if all(isinstance(text, str) for text in texts):
            return "".join(str(text) for text in texts)
    raise BadTurnsError(f"the content of turn {number} is {_kind(content)}, but must be text")


def _from_json(value: object, what: str) -> Any:
    if not isinstance(value, str) or not value.strip():
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise BadTurnsError(f"{what} is text that is not JSON ({error})") from None


def _without_nulls(value: Any) -> Any:
    """Columnar files fill what one object lacks and another has with None, at every depth."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _kind(value: object) -> str:
    return "missing" if value is None else f"a {type(value).__name__}"
