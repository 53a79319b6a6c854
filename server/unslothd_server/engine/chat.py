"""Chat rows: turns of either style made plain, rendered by the tokenizer's template, and the answers' places found."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

Turn = dict[str, Any]
Span = tuple[int, int]

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
    """The turns of a row cannot be used; the text says why."""


@dataclass(frozen=True)
class ChatText:
    """A rendered conversation.

    Args:
        text: What the template made of it.
        answers: Character ranges of `text` that are assistant turns, their end-of-turn text included where the
            template ends a turn before the next begins.
    """

    text: str
    answers: list[Span]


def plain_turns(value: object, column: str) -> list[Turn]:
    """Turns as {role, content}, whatever style they came in.

    Raises:
        BadTurnsError: Not a list of turns, or a turn without a usable role or content.
    """
    if not isinstance(value, list | tuple):
        raise BadTurnsError(f'"{column}" is {_kind(value)}, but must be a list of turns')
    if not value:
        raise BadTurnsError(f'"{column}" has no turns')
    return [_plain_turn(turn, number) for number, turn in enumerate(value, start=1)]


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
    if content is None and "tool_calls" in known:
        content = ""
    return {"role": ROLES.get(role.lower(), role), "content": _plain_content(content, number), **known}


def _plain_content(content: object, number: int) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        texts = [part.get("text") if isinstance(part, dict) else part for part in content]
        if all(isinstance(text, str) for text in texts):
            return "".join(str(text) for text in texts)
    raise BadTurnsError(f"the content of turn {number} is {_kind(content)}, but must be text")


def render_chat(render: Callable[..., str], turns: Sequence[Turn], learn: Sequence[int]) -> ChatText:
    """Renders turns and finds where the answers are, by rendering, never by searching for text.

    Args:
        render: Takes turns and add_generation_prompt, returns text; raises what the template raises.
        turns: The conversation.
        learn: Indexes of the turns that carry loss.

    Raises:
        BadTurnsError: The template refuses the conversation.
    """
    try:
        text = render(turns, add_generation_prompt=False)
    except Exception as error:
        raise BadTurnsError(f"the chat template refuses it ({error})") from error
    spans = [_answer_span(render, turns, index, text) for index in learn]
    return ChatText(text, [span for span in spans if span is not None and span[0] < span[1]])


def _answer_span(render: Callable[..., str], turns: Sequence[Turn], index: int, text: str) -> Span | None:
    before = _try_render(render, turns[:index], add_generation_prompt=True) if index else None
    through = _try_render(render, turns[: index + 1], add_generation_prompt=False)
    content = None
    if before is None or not text.startswith(before):
        content = _content_span(render, turns, index, text)
        start = content[0] if content else None
    else:
        start = len(before)
    if through is None or not text.startswith(through):
        content = content or _content_span(render, turns, index, text)
        end = content[1] if content else None
    else:
        end = len(through)
    return None if start is None or end is None else (start, end)


def _content_span(render: Callable[..., str], turns: Sequence[Turn], index: int, text: str) -> Span | None:
    """Where a turn's content is, for templates that write a turn differently once others follow it.

    The same conversation with another content in this turn differs from the text exactly there.
    """
    content = turns[index]["content"]
    if not content.strip():
        return None
    other = "".join("x" if character != "x" else "y" for character in (content.strip()[0], content.strip()[-1]))
    changed = _try_render(
        render, [*turns[:index], {**turns[index], "content": other}, *turns[index + 1 :]], add_generation_prompt=False
    )
    if changed is None or changed == text:
        return None
    start = _common_length(text, changed)
    tail = _common_length(text[start:][::-1], changed[start:][::-1])
    return start, len(text) - tail


def _common_length(one: str, other: str) -> int:
    """Characters that two texts begin with alike."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((index for index, (left, right) in pairs if left != right), min(len(one), len(other)))


def _try_render(render: Callable[..., str], turns: Sequence[Turn], *, add_generation_prompt: bool) -> str | None:
    """None when the template refuses this part of a conversation: many insist on complete pairs of turns."""
    from jinja2 import TemplateError

    try:
        return render(list(turns), add_generation_prompt=add_generation_prompt)
    except (TemplateError, ValueError, TypeError, KeyError, IndexError):
        return None


def _kind(value: object) -> str:
    return "missing" if value is None else f"a {type(value).__name__}"
