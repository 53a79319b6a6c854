"""Conversations rendered with a chat template, and the characters of them that an assistant wrote."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from unslothd_server.engine.turns import BadTurnsError, Tool, Turn, says_nothing

Span = tuple[int, int]
# Characters for private use: at least one of them is in no text.
PRIVATE_USE = range(0xE000, 0xF900)


class Render(Protocol):
    """Renders turns with a chat template; raises what the template raises."""

    def __call__(self, turns: Sequence[Turn], *, add_generation_prompt: bool) -> str:
        """Returns the text, which ends where an assistant begins to write if add_generation_prompt."""
        ...


@dataclass(frozen=True)
class ChatText:
    """A rendered conversation.

    Args:
        text: What the template made of it.
        answers: Character ranges of `text`, one for each turn that is learnt: all that the model has to write there,
            from the end of the generation prompt to the end of the turn.
        marked: True when the template itself marked the answers: then they are exactly what is learnt.
    """

    text: str
    answers: list[Span]
    marked: bool = False


class ChatTemplate:
    """A tokenizer's chat template.

    Args:
        tokenizer: A Transformers tokenizer with a chat template.

    Attributes:
        shows_tools: True when the template reads the tools of a row.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        # Some tokenizers have a template of its own for conversations with tools.
        self.shows_tools = "tools" in self._source([{}])

    def text(self, turns: Sequence[Turn], tools: list[Tool] | None) -> str:
        """Renders a conversation.

        Raises:
            BadTurnsError: The template refuses it.
        """
        return _whole(self._renderer(tools), turns)

    def answers(self, turns: Sequence[Turn], learn: Sequence[int], tools: list[Tool] | None) -> ChatText:
        """Renders a conversation and finds the answers: where the template marks them, else by rendering its parts.

        Args:
            turns: The conversation.
            learn: Indexes of the assistant turns that carry loss; those that say nothing are left out.
            tools: JSON schemas; None = none.

        Raises:
            BadTurnsError: The template refuses it.
        """
        learn = [index for index in learn if not says_nothing(turns[index])]
        marked = self._marked(turns, learn, tools) if marks_answers(self._source(tools)) else None
        return marked or render_chat(self._renderer(tools), turns, learn)

    def _marked(self, turns: Sequence[Turn], learn: Sequence[int], tools: list[Tool] | None) -> ChatText | None:
        """The answers as {% generation %} marks them; None when the marks cannot be told apart by turn."""
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            texts, marks = render_jinja_template(
                [list(turns)],
                tools=tools,
                chat_template=self._source(tools),
                return_assistant_tokens_mask=True,
                **self._tokenizer.special_tokens_map,
            )
        except Exception as error:
            raise _refused(error) from error
        spans = [(int(start), int(end)) for start, end in marks[0]]
        assistants = [index for index, turn in enumerate(turns) if turn["role"] == "assistant"]
        if list(learn) == assistants:
            return ChatText(texts[0], spans, marked=True)
        if len(spans) != len(assistants):
            return None
        chosen = [span for span, index in zip(spans, assistants, strict=True) if index in learn]
        return ChatText(texts[0], chosen, marked=True)

    def _source(self, tools: list[Tool] | None) -> str:
        return str(self._tokenizer.get_chat_template(None, tools))

    def _renderer(self, tools: list[Tool] | None) -> Render:
        def render(turns: Sequence[Turn], *, add_generation_prompt: bool) -> str:
            return str(
                self._tokenizer.apply_chat_template(
                    list(turns), tools=tools, tokenize=False, add_generation_prompt=add_generation_prompt
                )
            )

        return render


def marks_answers(source: str) -> bool:
    """True when a template says itself what an assistant wrote ({% generation %})."""
    return "generation %}" in source.replace("-%}", "%}").replace("endgeneration", "")


def render_chat(render: Render, turns: Sequence[Turn], learn: Sequence[int]) -> ChatText:
    """Renders turns and finds where the answers are, by rendering, never by searching for text.

    Args:
        render: The template.
        turns: The conversation.
        learn: Indexes of the turns that carry loss.

    Raises:
        BadTurnsError: The template refuses the conversation.
    """
    text = _whole(render, turns)
    mark = next(chr(code) for code in PRIVATE_USE if chr(code) not in text)
    spans = [_answer_span(render, turns, index, text, mark) for index in learn]
    return ChatText(text, [span for span in spans if span is not None and span[0] < span[1]])


def _whole(render: Render, turns: Sequence[Turn]) -> str:
    try:
        return render(turns, add_generation_prompt=False)
    except Exception as error:
        raise _refused(error) from error


def _refused(error: Exception) -> BadTurnsError:
    return BadTurnsError(f"the chat template refuses it ({error})")


def _answer_span(render: Render, turns: Sequence[Turn], index: int, text: str, mark: str) -> Span | None:
    """From where generation would begin to the end of the turn.

    Most templates write the turns before an answer, and those through it, as the beginning of the whole. Some write a
    turn differently once others follow it; then the places are told from what changes when the turn does.
    """
    is_last = index == len(turns) - 1
    before = _part(render, turns[:index], add_generation_prompt=True)
    through = text if is_last else _part(render, turns[: index + 1], add_generation_prompt=False)
    starts = before is not None and text.startswith(before)
    ends = through is not None and text.startswith(through)
    if starts and ends:
        return len(before or ""), len(through or "")
    said = _said(render, turns, index, text, mark)
    if said is None:
        return None
    lead, tail = _frame(render, turns[: index + 1], before, through, mark)
    start = said[0] - (len(lead) if text.endswith(lead, 0, said[0]) else 0)
    end = said[1] + _common_length(text[said[1] :], tail)
    return len(before or "") if starts else start, len(through or "") if ends else end


def _frame(
    render: Render, turns: Sequence[Turn], before: str | None, through: str | None, mark: str
) -> tuple[str, str]:
    """What the template writes around the words of the last turn, between generation prompt and end."""
    said = None if through is None else _said(render, turns, len(turns) - 1, through, mark)
    if said is None or through is None:
        return "", ""
    begins = before is not None and through.startswith(before)
    return through[len(before or "") : said[0]] if begins else "", through[said[1] :]


def _said(render: Render, turns: Sequence[Turn], index: int, text: str, mark: str) -> Span | None:
    """The range of what a turn itself says: its texts and calls.

    The same conversation with something else in this turn, in characters that the text does not have, differs from the
    text exactly there.
    """
    spans: list[Span] = []
    for other in _others(turns[index], mark):
        changed = _part(render, [*turns[:index], other, *turns[index + 1 :]], add_generation_prompt=False)
        if changed is None or changed == text:
            continue
        start = _common_length(text, changed)
        tail = _common_length(text[start:][::-1], changed[start:][::-1])
        spans.append((start, len(text) - tail))
    return (min(start for start, _ in spans), max(end for _, end in spans)) if spans else None


def _others(turn: Turn, mark: str) -> Iterator[Turn]:
    """The turn with each of its texts, and its calls, replaced by a mark."""
    for key, value in turn.items():
        if key != "role" and isinstance(value, str):
            yield {**turn, key: mark}
    if turn.get("tool_calls"):
        yield {**turn, "tool_calls": [_other_call(call, mark) for call in turn["tool_calls"]]}


def _other_call(call: dict[str, Any], mark: str) -> dict[str, Any]:
    if "function" in call:
        return {**call, "function": _other_call(call["function"], mark)}
    arguments = {mark: mark} if isinstance(call.get("arguments"), dict) else mark
    return {**call, "name": mark, "arguments": arguments}


def _common_length(one: str, other: str) -> int:
    """Characters that two texts begin with alike."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _part(render: Render, turns: Sequence[Turn], *, add_generation_prompt: bool) -> str | None:
    """None when the template refuses this part of a conversation: many insist on complete pairs of turns."""
    from jinja2 import TemplateError

    if not turns:
        return None
    try:
        return render(turns, add_generation_prompt=add_generation_prompt)
    except (TemplateError, ValueError, TypeError, KeyError, IndexError):
        return None
