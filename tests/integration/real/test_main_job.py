"""The main job over gRPC with real Unsloth: prepare, train, watch, read the results as others would."""

import json
import re
import subprocess
import sys
import urllib.parse
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from support.calls import CALL_SECONDS, error_of, inline, load, prepare, train, watch
from support.running_server import RunningServer
from unslothd.v1 import service_pb2 as pb
from unslothd.v1.dataset_pb2 import (
    AlpacaLayout,
    ChatLayout,
    DatasetSource,
    RowFormat,
    TemplateLayout,
    TextLayout,
)
from unslothd.v1.model_pb2 import LoraConfig, Model
from unslothd.v1.service_pb2_grpc import UnslothServiceStub
from unslothd.v1.training_event_pb2 import TrainingEvent
from unslothd.v1.training_pb2 import Training, TrainingConfig

pytestmark = pytest.mark.timeout(400)

TEXTS = [{"text": f"The quick brown fox jumps over the lazy dog number {number}."} for number in range(24)]


@pytest.fixture(scope="module")
def model(stub: UnslothServiceStub, loaded: Model) -> Model:
    config = TrainingConfig(
        max_steps=4, warmup_steps=1, learning_rate=1e-2, gradient_accumulation_steps=2, save_steps=2
    )
    return prepare(stub, loaded.model_id, config, lora=LoraConfig(r=8))


@pytest.fixture(scope="module")
def events(stub: UnslothServiceStub, model: Model) -> list[TrainingEvent]:
    """One training whose results several tests look at."""
    return list(train(stub, model.model_id, inline(TEXTS), eval_dataset=inline(TEXTS[:4])))


def of_kind(events: list[TrainingEvent], kind: str) -> list:
    return [getattr(event, kind) for event in events if event.WhichOneof("kind") == kind]


def test_a_prepared_model_counts_its_parameters_without_the_adapter(model: Model):
    assert model.state == Model.STATE_PREPARED
    # vocabulary 640 x 64 twice, two layers, norms; r=8 on the seven projections of both layers.
    assert (model.total_params, model.trainable_params) == (155_968, 16_384)


def test_every_step_is_an_event_with_all_its_figures(events: list[TrainingEvent]):
    steps = of_kind(events, "step")
    assert [step.step for step in steps] == [1, 2, 3, 4]
    for step in steps:
        assert step.total_steps == 4
        assert 0 < step.loss < 20
        assert step.grad_norm > 0
        assert step.tokens_per_second > 0
        assert step.step_seconds > 0
        assert step.peak_memory_bytes >= step.memory_bytes > 0
    assert [step.tokens for step in steps] == sorted({step.tokens for step in steps})
    assert steps[-1].eta_seconds == 0
    assert steps[-1].loss < steps[0].loss


def test_the_started_event_says_what_really_runs(events: list[TrainingEvent], model: Model):
    started = of_kind(events, "started")[0]
    assert started.engine.startswith("unsloth 20")
    assert (started.plan.num_rows, started.plan.num_eval_rows, started.plan.total_steps) == (24, 4, 4)
    assert started.plan.trainable_params == model.trainable_params
    assert started.plan.config.optim == "adamw_torch_fused"
    assert {warning.reason for warning in of_kind(events, "warning")} == {"OPTIMIZER_REPLACED"}
    unset = [field.name for field in TrainingConfig.DESCRIPTOR.fields if not started.plan.config.HasField(field.name)]
    assert unset == ["num_train_epochs"]


def test_eval_rows_are_evaluated_before_the_first_step_and_after_the_last(events: list[TrainingEvent]):
    evaluations = of_kind(events, "evaluation")
    assert [evaluation.step for evaluation in evaluations] == [0, 4]
    assert evaluations[1].eval_loss < evaluations[0].eval_loss


def test_checkpoints_and_the_final_adapter_are_where_they_are_said_to_be(
    stub: UnslothServiceStub, events: list[TrainingEvent]
):
    training = stub.GetTraining(pb.GetTrainingRequest(training_id=events[0].training_id)).training
    assert training.state == Training.STATE_SUCCEEDED
    assert [checkpoint.step for checkpoint in training.checkpoints] == [2, 4]
    for folder in [training.output_dir, *(checkpoint.path for checkpoint in training.checkpoints)]:
        assert Path(folder, "adapter_model.safetensors").is_file()
    metrics = training.metrics
    assert metrics.train_steps_per_second == pytest.approx(4 / metrics.train_runtime, rel=0.01)
    assert metrics.train_tokens == of_kind(events, "step")[-1].tokens
    assert metrics.eval_loss == of_kind(events, "evaluation")[-1].eval_loss


def test_five_watchers_of_one_training_all_see_every_event(stub: UnslothServiceStub, model: Model):
    owner = train(stub, model.model_id, inline(TEXTS))
    first = next(owner)
    with ThreadPoolExecutor(5) as pool:
        watchers = [pool.submit(lambda: list(watch(stub, first.training_id))) for _ in range(5)]
        logs = [watcher.result(CALL_SECONDS) for watcher in watchers]
    whole = [first, *owner]
    assert [event.sequence for event in whole] == list(range(1, len(whole) + 1))
    assert all(log == whole for log in logs)


def test_tensorboard_itself_shows_a_point_for_every_logged_step(events: list[TrainingEvent]):
    folder = of_kind(events, "started")[0].tensorboard_dir
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", folder, "--port", "0", "--host", "127.0.0.1"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as board:
        try:
            assert board.stderr is not None
            url = next(found[0] for line in board.stderr if (found := re.findall(r"http://127\.0\.0\.1:\d+/", line)))
            tags = _get(f"{url}data/plugin/scalars/tags")
            run = next(name for name, scalars in tags.items() if "train/loss" in scalars)
            query = urllib.parse.urlencode({"run": run, "tag": "train/loss"})
            points = _get(f"{url}data/plugin/scalars/scalars?{query}")
        finally:
            board.kill()
    assert [step for _, step, _ in points] == [1, 2, 3, 4]
    assert [value for _, _, value in points] == pytest.approx([step.loss for step in of_kind(events, "step")], rel=1e-4)


def _get(url: str):
    with urllib.request.urlopen(url, timeout=60) as response:
        return json.load(response)


LAYOUTS = {
    "text": ({"body": "a fox and a dog"}, RowFormat(text=TextLayout(column="body"))),
    "chat": (
        {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "good morning"}]},
        RowFormat(chat=ChatLayout()),
    ),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "good morning"}]},
        RowFormat(chat=ChatLayout()),
    ),
    "prompt_completion": ({"prompt": "two and three", "completion": " is five"}, None),
    "alpaca": (
        {"instruction": "Add the numbers.", "input": "2 and 3", "output": "5"},
        RowFormat(alpaca=AlpacaLayout()),
    ),
    "template": (
        {"review": "a good story", "label": "positive"},
        RowFormat(template=TemplateLayout(template="Review: {review} Label: {label}")),
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_trains_from_rows_inside_the_request(name: str, stub: UnslothServiceStub, model: Model):
    row, row_format = LAYOUTS[name]
    rows = inline([row] * 4)
    if row_format is not None:
        rows.row_format.CopyFrom(row_format)
    log = list(train(stub, model.model_id, rows, training_config=TrainingConfig(max_steps=1)))
    plan = of_kind(log, "started")[0].plan
    assert plan.row_format.WhichOneof("layout") == {"sharegpt": "chat"}.get(name, name)
    assert plan.loss_tokens > 0
    assert log[-1].HasField("succeeded")


def test_rows_come_from_a_file_on_the_server_too(server: RunningServer, stub: UnslothServiceStub, model: Model):
    (server.model_root / "rows.csv").write_text("prompt,completion\n" + "hello, good morning\n" * 4)
    log = list(train(stub, model.model_id, DatasetSource(path="rows.csv"), training_config=TrainingConfig(max_steps=1)))
    assert of_kind(log, "started")[0].plan.row_format.HasField("prompt_completion")


def test_a_hub_dataset_that_cannot_be_reached_says_so(stub: UnslothServiceStub, model: Model):
    rows = DatasetSource(hub={"name": "nobody/no-such-dataset"})
    error = error_of(lambda: train(stub, model.model_id, rows))
    assert (error.code, error.reason) in {("UNAVAILABLE", "HUB_UNREACHABLE"), ("NOT_FOUND", "DATASET_NOT_FOUND")}


BAD_ROWS = {
    "missing columns": (inline([{"foo": "a", "bar": "b"}]), "DATASET_COLUMNS", "foo"),
    "the second row is no JSON": (inline(['{"text": "a"}', '{"text": ']), "DATASET_ROW", "row 2"),
    "the third row has no text": (inline([{"text": "a"}, {"text": "b"}, {"text": None}]), "DATASET_ROW", "row 3"),
    "nothing but empty lines": (inline([" "]), "DATASET_EMPTY", ""),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_rows_that_cannot_be_trained_on_name_the_cause_and_leave_nothing(
    name: str, server: RunningServer, stub: UnslothServiceStub, model: Model
):
    rows, reason, said = BAD_ROWS[name]
    config = TrainingConfig(output_dir="never-made")
    error = error_of(lambda: train(stub, model.model_id, rows, training_config=config))
    assert (error.code, error.reason) == ("INVALID_ARGUMENT", reason)
    assert said in error.message.lower()
    assert not (server.output_root / "never-made").exists()


def test_a_saved_adapter_loads_again_keeps_its_weights_and_trains_on(
    stub: UnslothServiceStub, events: list[TrainingEvent], model: Model
):
    """Also: two real models at once."""
    again = load(stub, f"training:{events[0].training_id}", max_seq_length=128)
    try:
        assert again.total_params == model.total_params
        prepare(stub, again.model_id)
        config = TrainingConfig(max_steps=1, learning_rate=1e-2)
        log = list(train(stub, again.model_id, inline(TEXTS), eval_dataset=inline(TEXTS[:4]), training_config=config))
        before = of_kind(events, "evaluation")[-1].eval_loss
        assert of_kind(log, "evaluation")[0].eval_loss == pytest.approx(before, rel=1e-4)
    finally:
        freed = stub.UnloadModel(pb.UnloadModelRequest(model_id=again.model_id), timeout=CALL_SECONDS)
    assert freed.freed_memory_bytes > 100 * 1024 * 1024
    assert again.model_id not in {each.model_id for each in stub.ListModels(pb.ListModelsRequest()).models}


def test_cancelling_keeps_a_checkpoint_and_the_adapter_so_far(stub: UnslothServiceStub, model: Model):
    config = TrainingConfig(max_steps=100_000, save_steps=100_000)
    call = stub.Train(
        pb.TrainRequest(model_id=model.model_id, train_dataset=inline(TEXTS), training_config=config),
        timeout=CALL_SECONDS,
    )
    for response in call:
        training_id = response.event.training_id
        if response.event.step.step == 2:
            break
    stub.CancelTraining(pb.CancelTrainingRequest(training_id=training_id, save_checkpoint=True), timeout=CALL_SECONDS)
    error = error_of(lambda: call)
    assert (error.code, error.reason) == ("ABORTED", "TRAINING_CANCELLED")
    training = stub.GetTraining(pb.GetTrainingRequest(training_id=training_id)).training
    assert training.checkpoints[-1].step == training.step >= 2
    assert Path(training.output_dir, "adapter_model.safetensors").is_file()


def test_text_is_generated_with_and_without_the_adapter(stub: UnslothServiceStub, model: Model):
    def text(**fields) -> str:
        request = pb.GenerateRequest(model_id=model.model_id, prompt="The quick brown", max_new_tokens=8, **fields)
        *parts, last = stub.Generate(request, timeout=CALL_SECONDS)
        assert 1 <= last.summary.completion_tokens <= 8
        return "".join(part.text for part in parts)

    assert text() == text()
    assert text() != text(without_adapter=True)


@pytest.mark.parametrize("lora", [LoraConfig(target_modules=["q_proj", "no_such_proj"])])
def test_preparing_with_another_adapter_is_refused_with_the_next_step(
    lora: LoraConfig, stub: UnslothServiceStub, model: Model
):
    error = error_of(lambda: prepare(stub, model.model_id, lora=lora))
    assert (error.code, error.reason) in {
        ("FAILED_PRECONDITION", "ALREADY_PREPARED"),
        ("INVALID_ARGUMENT", "INVALID_FIELD"),
    }
