"""Turns and tools in the styles in which rows have them."""

import json
import re
from pathlib import Path

import pytest

from unslothd_server.engine.turns import BadTurnsError, plain_tools, plain_turns, says_nothing

PAGE = Path(__file__).parents[3] / "docs" / "rows.md"
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


@pytest.mark.parametrize("value", [[WEATHER], json.dumps([WEATHER]), [json.dumps(WEATHER)]])
def test_tools_are_objects_whether_given_as_such_or_as_json_text(value: object) -> None:
    assert plain_tools(value, "tools") == [WEATHER]


@pytest.mark.parametrize("value", [None, [], "", "[]"])
def test_a_row_may_have_no_tools(value: object) -> None:
    assert plain_tools(value, "tools") is None


@pytest.mark.parametrize(
    ("value", "cause"),
    [
        ("{", "not JSON"),
        ({"type": "function"}, "a dict, but must be a list"),
        ([7], "tool 1 .* is a int"),
        (["{"], "tool 1 .* not JSON"),
    ],
)
def test_bad_tools_are_named(value: object, cause: str) -> None:
    with pytest.raises(BadTurnsError, match=cause):
        plain_tools(value, "tools")


def test_nulls_of_columnar_files_are_left_out_at_every_depth() -> None:
    filled = {**WEATHER, "strict": None, "function": {**WEATHER["function"], "description": None}}  # type: ignore[dict-item]
    assert plain_tools([filled], "tools") == [WEATHER]


@pytest.mark.parametrize("arguments", [{"city": "Paris"}, '{"city": "Paris"}'])
def test_arguments_of_calls_are_objects_however_they_came(arguments: object) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": arguments}}
    [turn] = plain_turns([{"role": "assistant", "content": None, "tool_calls": [call]}], "messages")
    assert turn["content"] == ""
    assert turn["tool_calls"][0]["function"] == {"name": "weather", "arguments": {"city": "Paris"}}


@pytest.mark.parametrize(
    ("calls", "cause"),
    [
        ("no json", "not JSON"),
        ({"name": "weather"}, "a dict, but must be a list of calls"),
        ([{"function": {"arguments": {}}}], "has no name"),
        ([{"name": "weather", "arguments": "{"}], "arguments .* not JSON"),
    ],
)
def test_bad_calls_are_named(calls: object, cause: str) -> None:
    with pytest.raises(BadTurnsError, match=cause):
        plain_turns([{"role": "assistant", "tool_calls": calls}], "messages")


@pytest.mark.parametrize(
    ("turn", "expected"),
    [
        ({"role": "assistant", "content": " \n"}, True),
        ({"role": "assistant", "content": "", "tool_calls": []}, True),
        ({"role": "assistant", "content": "", "tool_calls": [{"name": "weather"}]}, False),
        ({"role": "assistant", "content": "", "reasoning_content": "hm"}, False),
        ({"role": "assistant", "content": "hello"}, False),
    ],
)
def test_a_turn_says_nothing_without_text_and_call(turn: dict[str, object], expected: bool) -> None:
    assert says_nothing(turn) is expected


def test_the_rows_of_the_page_are_good_rows() -> None:
    rows = [json.loads(block) for block in re.findall(r"^```json\n(.*?)^```", PAGE.read_text(), re.M | re.S)]
    assert [turn["role"] for turn in plain_turns(rows[0]["messages"], "messages")] == [
        "user",
        "assistant",
        "tool",
        "assistant",
    ]
    assert plain_tools(rows[0]["tools"], "tools")
    assert set(rows[1]) == {"prompt", "chosen", "rejected"}
