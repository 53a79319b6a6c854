"""`unslothd plan`: the figures, and which part of a row carries loss."""

import json

import pytest
from rich.text import Text

from support.terminal import Terminal
from unslothd.cli import plan
from unslothd.v1 import dataset_pb2, model_pb2, service_pb2, training_pb2

PREPARED = model_pb2.Model(model_id="tiny-unsloth", state=model_pb2.Model.STATE_PREPARED)
ROW = training_pb2.RenderedRow(text="<|user|>Hi<|bot|>Hello</s>", num_tokens=9, loss_spans=[17, 26], truncated=True)
PLAN = training_pb2.TrainingPlan(
    config=training_pb2.TrainingConfig(learning_rate=2e-4, max_steps=60),
    row_format=dataset_pb2.RowFormat(chat=dataset_pb2.ChatLayout(column="messages"), completion_only_loss=True),
    num_rows=1000,
    num_tokens=40000,
    mean_row_tokens=40,
    longest_row_tokens=512,
    loss_tokens=10000,
    truncated_rows=3,
    dropped_rows=2,
    num_eval_rows=50,
    total_steps=60,
    trainable_params=11272192,
    memory_estimate_bytes=6 * 2**30,
    memory_free_bytes=70 * 2**30,
    memory_measured=True,
    tokens_per_second=23834,
    step_seconds=0.5,
    preview=[ROW],
    warnings=["3 rows were cut at 512 tokens."],
)


@pytest.fixture
def rows(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "hello"}\n')
    return str(file)


@pytest.fixture
def planning(server, say):
    server.script.on("GetModel", say.answer(service_pb2.GetModelResponse(model=PREPARED)))
    server.script.on("PlanTraining", say.answer(service_pb2.PlanTrainingResponse(plan=PLAN)))
    return server


def test_a_plan_shows_rows_tokens_memory_speed_config_and_warnings(planning, cli, rows):
    arguments = ["--model-id", "tiny-unsloth", "--dataset", rows, "--max-steps", "60", "--measure"]
    shown = cli("plan", *arguments)
    assert shown.exit_code == 0
    for text in (
        "chat, loss on the answers only",
        "1 000 (3 truncated, 2 dropped)",
        "40 000 a pass, 40 a row, 512 in the longest",
        "on 10 000 of them (25%)",
        "11 272 192 parameters",
        "6.0 GiB at its peak, 70.0 GiB free (measured)",
        "23 834 tok/s, 0.5 s a step of the longest rows: at most 30.0 s in all",
        "learning_rate = 0.0002",
        "row 1: 9 tokens, cut at max_seq_length",
        "<|user|>Hi<|bot|>⟦Hello</s>⟧",
    ):
        assert text in shown.stdout
    assert "warning: 3 rows were cut at 512 tokens." in shown.stderr
    assert "measuring passes on the model's device" in shown.stderr
    request = planning.script.calls("PlanTraining")[0]
    assert (request.model_id, request.measure, request.preview_rows) == ("tiny-unsloth", True, 3)
    assert request.training_config == training_pb2.TrainingConfig(max_steps=60)
    assert request.train_dataset.inline.data


def test_a_plan_with_json_is_one_object(planning, cli, rows):
    shown = cli("plan", "--model-id", "tiny-unsloth", "--dataset", rows, "--json")
    assert json.loads(shown.stdout)["preview"][0]["loss_spans"] == [17, 26]
    assert shown.stderr == ""


def test_a_plan_needs_a_model_as_train_does(cli, rows):
    assert cli("plan", "--dataset", rows).exit_code == 2


def test_a_terminal_dims_what_carries_no_loss(planning, rows):
    code, shown = Terminal("plan", "--model-id", "tiny-unsloth", "--dataset", rows, "--target", planning.target).wait()
    assert code == 0
    assert "\x1b[2m<|user|>Hi<|bot|>\x1b[0m\x1b[1mHello</s>\x1b[0m" in shown
    assert "Dimmed text carries no loss" in shown
    assert "reading the rows as the training would" in shown


def styles(text: Text) -> list[tuple[str, str]]:
    return [(text.plain[span.start : span.end], str(span.style)) for span in text.spans if span.start < span.end]


def test_several_answers_are_each_told_apart():
    row = training_pb2.RenderedRow(text="aBBcDDe", loss_spans=[1, 3, 4, 6])
    found = styles(plan.rendered(row, styled=True))
    assert found == [("a", "dim"), ("BB", "bold"), ("c", "dim"), ("DD", "bold"), ("e", "dim")]
    assert plan.rendered(row, styled=False).plain == "a⟦BB⟧c⟦DD⟧e"


def test_a_row_without_loss_is_dimmed_as_a_whole():
    assert styles(plan.rendered(training_pb2.RenderedRow(text="abc"), styled=True)) == [("abc", "dim")]


def test_control_characters_of_a_row_do_not_reach_the_terminal():
    row = training_pb2.RenderedRow(text="a\x1b[31mb\r\nc", loss_spans=[0, 1])
    assert plan.rendered(row, styled=False).plain == "⟦a⟧␛[31mb␍\nc"


def test_a_long_row_is_shortened_and_says_so():
    row = training_pb2.RenderedRow(text="x" * 5000, loss_spans=[4500, 5000])
    assert plan.rendered(row, styled=False).plain.endswith("x\n… 1 000 more characters; --json has them all")
