"""Each layout: what the model sees of a row, and exactly which of its tokens are learnt."""

from pathlib import Path
from typing import Any

import pytest

from support.engine_runs import Loaded, LoadTiny, Row
from support.tiny_model import CHAT_TEMPLATE, build_tiny_llama
from unslothd.v1.dataset_pb2 import (
    AlpacaLayout,
    ChatLayout,
    PromptCompletionLayout,
    RowFormat,
    TemplateLayout,
    TextLayout,
)
from unslothd_server.engine.layouts import resolve_layout
from unslothd_server.engine.rendering import RowRenderer
from unslothd_server.errors import DatasetError

END = "<|im_end|>"


@pytest.fixture(scope="session")
def tokenizer(versions: dict[str, str], tiny: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny)


def seen(tokenizer: Any, row: Row, given: RowFormat | None = None, max_seq_length: int = 256) -> tuple[str, list[str]]:
    """The row as the model sees it, and the learnt stretches of it, from tokens and from the preview alike."""
    renderer = RowRenderer(tokenizer, resolve_layout(given, list(row), field="train_dataset"), max_seq_length)
    [[rendered]] = renderer.render([(1, row)])
    preview = renderer.preview(rendered)
    spans = list(zip(preview.loss_spans[::2], preview.loss_spans[1::2], strict=True))
    from_preview = [preview.text[start:end] for start, end in spans]
    learnt = [token for token, learn in zip(rendered.input_ids, rendered.carries_loss, strict=True) if learn]
    assert tokenizer.decode(learnt) == "".join(from_preview)
    assert tokenizer.decode(rendered.input_ids) == preview.text
    assert preview.num_tokens == len(rendered.input_ids)
    return preview.text, from_preview


def test_text_is_learnt_from_its_second_token_to_the_end_token(tokenizer: Any) -> None:
    text, learnt = seen(tokenizer, {"text": "Hello, how are you?"})
    assert text == "Hello, how are you?" + END
    first = tokenizer.decode(tokenizer("Hello, how are you?")["input_ids"][:1])
    assert learnt == [text.removeprefix(first)]


def test_text_that_ends_with_the_end_token_does_not_get_a_second_one(tokenizer: Any) -> None:
    assert seen(tokenizer, {"text": "Good morning." + END})[0] == "Good morning." + END


def test_text_comes_from_the_column_that_was_named(tokenizer: Any) -> None:
    given = RowFormat(text=TextLayout(column="story"))
    assert seen(tokenizer, {"story": "the sea", "text": "no"}, given)[0] == "the sea" + END


CHAT = [
    {"role": "system", "content": "You are kind."},
    {"role": "user", "content": "Say hello"},
    {"role": "assistant", "content": "Say hello"},
    {"role": "user", "content": "Grüße, 東京"},
    {"role": "assistant", "content": "Ελλάδα 東京"},
]
SHAREGPT = [
    {"from": {"user": "human", "assistant": "gpt"}.get(turn["role"], turn["role"]), "value": turn["content"]}
    for turn in CHAT
]


@pytest.mark.parametrize("row", [{"messages": CHAT}, {"conversations": SHAREGPT}], ids=["openai", "sharegpt"])
def test_of_a_chat_every_answer_is_learnt_with_its_end_token_and_nothing_else(tokenizer: Any, row: Row) -> None:
    text, learnt = seen(tokenizer, row)
    assert text == tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert learnt == ["Say hello" + END, "Ελλάδα 東京" + END]


def test_a_template_that_marks_answers_itself_is_believed(tokenizer: Any, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    marking = CHAT_TEMPLATE.replace(
        "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}",
        "{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}"
        "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
        "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}",
    )
    assert "generation %}" in marking
    folder = build_tiny_llama(tmp_path / "marking", chat_template=marking)
    text, learnt = seen(AutoTokenizer.from_pretrained(folder), {"messages": CHAT})
    assert learnt == ["Say hello" + END, "Ελλάδα 東京" + END]
    assert text == tokenizer.apply_chat_template(CHAT, tokenize=False)


def test_of_a_chat_everything_is_learnt_when_asked(tokenizer: Any) -> None:
    given = RowFormat(chat=ChatLayout(), completion_only_loss=False)
    text, learnt = seen(tokenizer, {"messages": CHAT}, given)
    assert learnt == [text.removeprefix("<|im_start|>")]


def test_of_prompt_and_completion_the_completion_is_learnt_with_the_end_token(tokenizer: Any) -> None:
    text, learnt = seen(tokenizer, {"prompt": "2 and 3 are", "completion": " 5"})
    assert text == "2 and 3 are 5" + END
    assert learnt == [" 5" + END]


def test_a_token_that_spans_the_border_of_prompt_and_completion_is_learnt(tokenizer: Any) -> None:
    text, learnt = seen(tokenizer, {"prompt": "2 and 3 are ", "completion": "5"})
    assert text == "2 and 3 are 5" + END
    assert learnt == [" 5" + END]


def test_prompt_and_completion_may_be_turns(tokenizer: Any) -> None:
    row = {"prompt": CHAT[:4], "completion": CHAT[4:]}
    text, learnt = seen(tokenizer, row)
    assert text == tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert learnt == ["Ελλάδα 東京" + END]


def test_prompt_and_completion_columns_can_be_named_and_all_be_learnt(tokenizer: Any) -> None:
    given = RowFormat(
        prompt_completion=PromptCompletionLayout(prompt_column="q", completion_column="a"), completion_only_loss=False
    )
    text, learnt = seen(tokenizer, {"q": "1 2 3", "a": " 4 5"}, given)
    assert text == "1 2 3 4 5" + END
    assert learnt == ["".join(text[1:])]


@pytest.mark.parametrize(("context", "shown"), [("2 and 3", True), ("", False), (None, False)])
def test_alpaca_learns_the_output(tokenizer: Any, context: str | None, shown: bool) -> None:
    row = {"instruction": "Add the numbers.", "input": context, "output": "The answer is 5."}
    text, learnt = seen(tokenizer, row, RowFormat(alpaca=AlpacaLayout()))
    assert "### Instruction:\nAdd the numbers.\n\n" in text
    assert ("### Input:\n2 and 3\n\n" in text) is shown
    assert text.endswith("### Response:\nThe answer is 5." + END)
    assert learnt == ["The answer is 5." + END]


def test_a_template_is_filled_from_the_columns_with_braces_and_numbers(tokenizer: Any) -> None:
    given = RowFormat(template=TemplateLayout(template="{{x}} {text} = {label} {text}"))
    text, learnt = seen(tokenizer, {"text": "{label}", "label": 7}, given)
    assert text == "{x} {label} = 7 {label}" + END
    assert learnt == [text[1:]]


def test_a_long_row_is_cut_and_says_so(tokenizer: Any) -> None:
    renderer = RowRenderer(tokenizer, resolve_layout(None, ["text"], field="train_dataset"), 4)
    [[rendered]] = renderer.render([(1, {"text": "0 1 2 3 4 5 6 7 8 9"})])
    assert rendered.truncated
    assert renderer.preview(rendered).truncated
    assert len(rendered.input_ids) == 4


BAD = [
    ({"text": None}, "text", "null"),
    ({"text": 7}, "text", "a int"),
    ({"messages": "hello"}, "messages", "list of turns"),
    ({"messages": [{"role": "user"}]}, "turn 1", "missing"),
    ({"prompt": "a", "completion": None}, "completion", "null"),
    ({"prompt": [{"role": "user", "content": "a"}], "completion": "b"}, "both", "turns"),
    ({"instruction": "a", "output": ["b"]}, "output", "a list"),
]


@pytest.mark.parametrize(("row", "where", "cause"), BAD)
def test_a_row_that_cannot_be_rendered_is_named_with_its_cause(
    tokenizer: Any, row: Row, where: str, cause: str
) -> None:
    renderer = RowRenderer(tokenizer, resolve_layout(None, list(row), field="train_dataset"), 64)
    with pytest.raises(DatasetError) as raised:
        renderer.render([(41, row)])
    assert raised.value.reason_name == "DATASET_ROW"
    assert "Row 41" in raised.value.message
    assert where in raised.value.message
    assert cause in raised.value.message


def test_chat_rows_need_a_chat_template(load: LoadTiny, tmp_path: Path) -> None:
    loaded: Loaded = load(build_tiny_llama(tmp_path / "base", chat_template=None))
    loaded.prepare()
    with pytest.raises(DatasetError, match="no chat template"):
        loaded.train([{"messages": CHAT}])
    assert not (tmp_path / "out").exists()
