"""Where the answers are in a rendered conversation, for templates of several habits."""

from collections.abc import Callable, Sequence

import pytest
from jinja2 import Environment, TemplateError

from unslothd_server.engine.chat import render_chat
from unslothd_server.engine.turns import BadTurnsError, Turn, plain_turns

CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# Keeps the thoughts of the last turn only, so an earlier turn is written otherwise once others follow.
FORGETFUL = (
    "{% for m in messages %}<|{{ m.role }}|>"
    "{% if m.role == 'assistant' and not loop.last %}{{ m.content.split('</think>')[-1] }}"
    "{% else %}{{ m.content }}{% endif %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# Insists on turns that alternate and end with an answer.
STRICT = (
    "{% if messages[-1].role != 'assistant' %}{{ refuse('must end with an answer') }}{% endif %}"
    "{% for m in messages %}[{{ m.role }}] {{ m.content | trim }} {% endfor %}"
)

TURNS = [
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "<think>short</think>hello"},
    {"role": "user", "content": "bye"},
    {"role": "assistant", "content": "<think>long</think>goodbye"},
]


def renderer(template: str) -> Callable[..., str]:
    def refuse(text: str) -> None:
        raise TemplateError(text)

    compiled = Environment(autoescape=False).from_string(template)

    def render(turns: Sequence[Turn], *, add_generation_prompt: bool) -> str:
        return compiled.render(messages=turns, add_generation_prompt=add_generation_prompt, refuse=refuse)

    return render


@pytest.mark.parametrize(
    ("template", "answers"),
    [
        (CHATML, ["<think>short</think>hello<|end|>\n", "<think>long</think>goodbye<|end|>\n"]),
        (FORGETFUL, ["hello<|end|>", "<think>long</think>goodbye<|end|>"]),
        (STRICT, ["<think>short</think>hello ", "<think>long</think>goodbye "]),
    ],
    ids=["plain", "forgets earlier thoughts", "refuses parts"],
)
def test_every_answer_is_found_also_where_its_words_were_said_before(template: str, answers: list[str]) -> None:
    rendered = render_chat(renderer(template), TURNS, [1, 3])
    assert [rendered.text[start:end] for start, end in rendered.answers] == answers


def test_only_the_turns_asked_for_are_found() -> None:
    rendered = render_chat(renderer(CHATML), TURNS, [3])
    assert [rendered.text[start:end] for start, end in rendered.answers] == ["<think>long</think>goodbye<|end|>\n"]


def test_a_conversation_that_the_template_refuses_is_bad_with_the_templates_words() -> None:
    with pytest.raises(BadTurnsError, match="must end with an answer"):
        render_chat(renderer(STRICT), TURNS[:3], [1])


def test_sharegpt_turns_become_plain_turns() -> None:
    turns = [
        {"from": "system", "value": "be kind"},
        {"from": "human", "value": "hi"},
        {"from": "gpt", "value": "hello"},
    ]
    assert plain_turns(turns, "conversations") == [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "hello"},
    ]


def test_keys_that_a_columnar_file_filled_with_none_are_left_out() -> None:
    turns = [{"role": "user", "content": "hi", "tool_calls": None, "from": None}]
    assert plain_turns(turns, "messages") == [{"role": "user", "content": "hi"}]


def test_text_parts_are_joined() -> None:
    turns = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    assert plain_turns(turns, "messages") == [{"role": "user", "content": "ab"}]


@pytest.mark.parametrize(
    ("value", "cause"),
    [
        (None, "missing"),
        ("hello", "a str"),
        ([], "no turns"),
        (["hello"], "turn 1 is a str"),
        ([{"content": "a"}], "turn 1 has no role"),
        ([{"role": "user", "content": "a"}, {"role": "assistant"}], "content of turn 2 is missing"),
        ([{"role": "user", "content": 7}], "content of turn 1 is a int"),
        ([{"role": "user", "content": [{"type": "image"}]}], "content of turn 1 is a list"),
    ],
)
def test_bad_turns_are_named(value: object, cause: str) -> None:
    with pytest.raises(BadTurnsError, match=cause):
        plain_turns(value, "messages")
