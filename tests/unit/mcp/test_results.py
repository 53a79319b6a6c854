"""Messages as results: plain values, fixed keys, what can be done next; and errors without secrets."""

import json

import grpc
import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from google.rpc.status_pb2 import Status
from pydantic import TypeAdapter, ValidationError

import unslothd
from unslothd.errors import FieldViolation, NotFound
from unslothd.v1.dataset_pb2 import DatasetSource, InlineRows
from unslothd.v1.training_event_pb2 import StepProgress, TrainingEvent
from unslothd.v1.training_pb2 import Checkpoint, Training, TrainingConfig, TrainingMetrics
from unslothd_mcp import results
from unslothd_mcp.errors import ToolFailure, as_result
from unslothd_mcp.plain import plain
from unslothd_mcp.progress import step_text
from unslothd_mcp.safety import Loss


def test_numbers_are_numbers_and_enums_are_short():
    config = TrainingConfig(seed=2**40, micro_batching=2, learning_rate=0.5)
    assert plain(config) == {"seed": 2**40, "micro_batching": "tuned", "learning_rate": 0.5}


def test_times_errors_maps_and_lists_are_plain_and_bytes_are_left_out():
    training = Training(
        training_id="t",
        state=Training.STATE_FAILED,
        error=Status(code=8, message="full"),
        create_time=Timestamp(seconds=0),
        labels={"a": "b"},
        checkpoints=[Checkpoint(step=3, path="/c")],
        train_dataset=DatasetSource(inline=InlineRows(data=b"secret rows")),
    )
    shown = plain(training)
    assert shown["state"] == "failed"
    assert shown["error"] == {"code": "RESOURCE_EXHAUSTED", "reason": "", "message": "full"}
    assert shown["create_time"] == "1970-01-01T00:00:00Z"
    assert (shown["labels"], shown["checkpoints"]) == ({"a": "b"}, [{"step": 3, "path": "/c"}])
    assert "secret rows" not in json.dumps(shown)


def test_a_loss_that_is_not_finite_has_a_name_that_json_has():
    event = TrainingEvent(step=StepProgress(loss=float("nan")))
    assert plain(event)["step"]["loss"] == "nan"


def test_a_final_loss_that_is_not_finite_is_null_as_its_schema_allows():
    figures = results.metrics(TrainingMetrics(train_loss=float("inf"), eval_loss=float("nan")))
    assert (figures["train_loss"], figures["eval_loss"]) == (None, None)
    TypeAdapter(results.Metrics).validate_python(figures)


STATES = {
    "queued": "unsloth_watch_training",
    "running": "unsloth_watch_training",
    "recovering": "unsloth_watch_training",
    "paused": "unsloth_resume_training",
    "cancelled": "unsloth_resume_training",
    "failed": "unsloth_resume_training",
    "succeeded": "unsloth_generate",
}


@pytest.mark.parametrize("state", STATES)
def test_every_state_of_a_training_says_what_can_be_done(state: str):
    training = Training(training_id="t", state=Training.State.Value(f"STATE_{state.upper()}"))
    assert STATES[state] in results.after(training)
    assert results.training_view(training)["next_step"] == results.after(training)


def test_the_message_of_a_step_has_loss_and_time_left():
    step = StepProgress(step=3, total_steps=10, loss=1.23456, eta_seconds=75)
    assert step_text(step) == "step 3/10, loss 1.2346, ETA 0:01:15"


def test_an_error_of_the_server_keeps_code_reason_fields_and_figures():
    error = NotFound(
        "No such model.",
        code=grpc.StatusCode.NOT_FOUND,
        reason="MODEL_NOT_FOUND",
        metadata={"near": "tiny"},
        field_violations=[FieldViolation("model_id", "unknown")],
    )
    content = as_result(error, "unsloth_train", {}).structured_content
    assert content == {
        "code": "NOT_FOUND",
        "reason": "MODEL_NOT_FOUND",
        "message": "No such model.",
        "fields": [{"field": "model_id", "description": "unknown"}],
        "next_step": "Call unsloth_list_models for the ids that are loaded, or unsloth_load_model.",
        "metadata": {"near": "tiny"},
    }


def test_a_training_that_failed_is_named():
    error = unslothd.TrainingFailed("broken", reason="DISK_FULL")
    error.training_id = "training-1"
    assert as_result(error, "unsloth_train", {}).structured_content["training_id"] == "training-1"


def test_a_bug_shows_nothing_internal():
    content = as_result(RuntimeError("the secret inside of a bug"), "unsloth_train", {}).structured_content
    assert (content["code"], content["reason"]) == ("INTERNAL", "ADAPTER")
    assert "secret" not in json.dumps(content)


def test_a_token_is_removed_from_every_text():
    failure = ToolFailure("INVALID_FIELD", "hf_x is bad", details={"a": [{"b": "hf_x"}]})
    result = as_result(failure, "unsloth_load_model", {"token": "hf_x"})
    assert "hf_x" not in result.model_dump_json()
    assert result.structured_content["message"] == "[token] is bad"


def test_a_wrong_argument_is_described_without_its_value():
    with pytest.raises(ValidationError) as caught:
        TypeAdapter(int).validate_python("hunter2")
    assert "hunter2" not in as_result(caught.value, "unsloth_train", {}).model_dump_json()


def test_a_confirmation_is_bound_to_exactly_what_would_be_lost():
    loss = Loss("…", {"unload": "a", "cancels": ["1", "2"]})
    assert loss.digest == Loss("other words", {"cancels": ["1", "2"], "unload": "a"}).digest
    assert loss.digest != Loss("…", {"unload": "a", "cancels": ["1"]}).digest


def test_an_error_says_how_long_to_wait_where_that_is_known():
    known = unslothd.errors.ResourceExhausted("slow down", reason="TOO_MANY_REQUESTS", retry_after=1.5)
    unknown = unslothd.errors.ResourceExhausted("full", reason="QUEUE_FULL")
    assert as_result(known, "unsloth_train", {}).structured_content["retry_after_seconds"] == 1.5
    assert "retry_after_seconds" not in as_result(unknown, "unsloth_train", {}).structured_content
