"""How the layout of rows is told from their columns."""

import pytest

from unslothd.v1.dataset_pb2 import (
    AlpacaLayout,
    ChatLayout,
    PreferenceLayout,
    PromptCompletionLayout,
    RowFormat,
    TemplateLayout,
    TextLayout,
)
from unslothd_server.engine.layouts import require_trainable, resolve_layout
from unslothd_server.errors import DatasetError, InvalidFieldsError

DETECTED = [
    (["messages"], RowFormat(chat=ChatLayout(column="messages"), completion_only_loss=True)),
    (["id", "conversations"], RowFormat(chat=ChatLayout(column="conversations"), completion_only_loss=True)),
    (["messages", "text"], RowFormat(chat=ChatLayout(column="messages"), completion_only_loss=True)),
    (
        ["prompt", "completion", "text"],
        RowFormat(
            prompt_completion=PromptCompletionLayout(prompt_column="prompt", completion_column="completion"),
            completion_only_loss=True,
        ),
    ),
    (["instruction", "input", "output", "text"], RowFormat(alpaca=AlpacaLayout(), completion_only_loss=True)),
    (["text", "label"], RowFormat(text=TextLayout(column="text"), completion_only_loss=False)),
]


@pytest.mark.parametrize(("columns", "expected"), DETECTED, ids=[",".join(columns) for columns, _ in DETECTED])
def test_the_layout_is_detected_from_the_columns_with_every_field_set(columns: list[str], expected: RowFormat) -> None:
    assert resolve_layout(None, columns, field="train_dataset") == expected


def test_columns_that_fit_no_layout_are_named_with_what_is_recognised() -> None:
    with pytest.raises(DatasetError) as raised:
        resolve_layout(None, ["review", "stars"], field="train_dataset")
    assert raised.value.reason_name == "DATASET_COLUMNS"
    assert '"review", "stars"' in raised.value.message
    assert "template" in raised.value.message


def test_a_given_layout_says_which_columns_it_needs_and_which_were_found() -> None:
    with pytest.raises(DatasetError) as raised:
        resolve_layout(RowFormat(alpaca=AlpacaLayout()), ["question", "answer"], field="train_dataset")
    assert raised.value.reason_name == "DATASET_COLUMNS"
    assert '"instruction", "output"' in raised.value.message
    assert '"question", "answer"' in raised.value.message


def test_a_flag_without_a_layout_is_kept_when_the_layout_is_detected() -> None:
    resolved = resolve_layout(RowFormat(completion_only_loss=False), ["messages"], field="train_dataset")
    assert resolved == RowFormat(chat=ChatLayout(column="messages"), completion_only_loss=False)


@pytest.mark.parametrize(
    "given",
    [RowFormat(text=TextLayout()), RowFormat(template=TemplateLayout(template="{text}"))],
    ids=["text", "template"],
)
def test_loss_on_answers_only_is_refused_where_there_are_no_answers(given: RowFormat) -> None:
    given.completion_only_loss = True
    with pytest.raises(InvalidFieldsError) as raised:
        resolve_layout(given, ["text"], field="eval_dataset")
    assert [violation.field for violation in raised.value.violations] == [
        "eval_dataset.row_format.completion_only_loss"
    ]


@pytest.mark.parametrize("given", [None, RowFormat(preference=PreferenceLayout())], ids=["detected", "given"])
def test_preference_rows_are_known_but_not_trained_on(given: RowFormat | None) -> None:
    resolved = resolve_layout(given, ["prompt", "chosen", "rejected"], field="train_dataset")
    columns = PreferenceLayout(prompt_column="prompt", chosen_column="chosen", rejected_column="rejected")
    assert resolved == RowFormat(preference=columns, completion_only_loss=True)
    with pytest.raises(DatasetError, match="prompt_completion with completion_column") as raised:
        require_trainable(resolved)
    assert raised.value.reason_name == "DATASET_COLUMNS"


def test_preference_rows_need_both_answers() -> None:
    with pytest.raises(DatasetError, match='"chosen", "rejected", but the rows have "prompt"'):
        resolve_layout(RowFormat(preference=PreferenceLayout()), ["prompt"], field="train_dataset")


TRAINED_ON = RowFormat(template=TemplateLayout(template="{review}"), completion_only_loss=False)


def test_rows_to_evaluate_on_follow_the_layout_of_those_that_are_trained_on() -> None:
    resolved = resolve_layout(None, ["review", "text"], field="eval_dataset", like=TRAINED_ON)
    assert resolved == TRAINED_ON


def test_rows_to_evaluate_on_with_other_columns_are_refused_with_both_named() -> None:
    with pytest.raises(DatasetError, match="train_dataset") as raised:
        resolve_layout(None, ["text"], field="eval_dataset", like=TRAINED_ON)
    assert '"review"' in raised.value.message
    assert '"text"' in raised.value.message


def test_rows_to_evaluate_on_may_have_a_layout_of_their_own() -> None:
    own = RowFormat(text=TextLayout(column="text"), completion_only_loss=False)
    assert resolve_layout(RowFormat(text=TextLayout()), ["text"], field="eval_dataset", like=TRAINED_ON) == own


def test_rows_to_evaluate_on_may_follow_the_layout_and_set_the_flag() -> None:
    like = RowFormat(chat=ChatLayout(column="messages"), completion_only_loss=True)
    given = RowFormat(completion_only_loss=False)
    resolved = resolve_layout(given, ["messages"], field="eval_dataset", like=like)
    assert resolved == RowFormat(chat=ChatLayout(column="messages"), completion_only_loss=False)


@pytest.mark.parametrize(
    "template", ["{text.__class__}", "{rows[0]}", "{text!r}", "{text:>9}", "{}", "{text", "no place"]
)
def test_a_template_with_more_than_plain_places_is_refused(template: str) -> None:
    with pytest.raises(InvalidFieldsError) as raised:
        resolve_layout(RowFormat(template=TemplateLayout(template=template)), ["text"], field="train_dataset")
    assert raised.value.violations[0].field == "train_dataset.row_format.template.template"


def test_a_template_needs_the_columns_it_names() -> None:
    given = RowFormat(template=TemplateLayout(template="{{brace}} {review} {stars}"))
    assert (
        resolve_layout(given, ["stars", "review"], field="train_dataset").template.template == given.template.template
    )
    with pytest.raises(DatasetError, match='"stars"'):
        resolve_layout(given, ["review"], field="train_dataset")
