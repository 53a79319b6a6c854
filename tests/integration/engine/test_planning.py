"""A plan says what the started event of the same training says, and leaves no trace."""

import random
import threading
from pathlib import Path

import pytest

from support.engine_runs import Loaded, LoadTiny, Row, as_source, memory
from unslothd.v1.dataset_pb2 import RowFormat, TemplateLayout
from unslothd.v1.model_pb2 import LoraConfig
from unslothd.v1.training_pb2 import MICRO_BATCHING_TUNED, TrainingConfig, TrainingPlan
from unslothd.worker.v1.worker_service_pb2 import PlanTrainingRequest, StartTrainingRequest
from unslothd_server.errors import AbortedError, DatasetError

CHAT = [
    {"role": "user", "content": "Hello, how are you?"},
    {"role": "assistant", "content": "I am fine, thank you."},
    {"role": "user", "content": "Good morning."},
    {"role": "assistant", "content": "Good morning."},
]
LAYOUTS: dict[str, tuple[list[Row], RowFormat | None]] = {
    "text": ([{"text": f"{number} 1 2 3" * (number + 1)} for number in range(5)], None),
    "chat": ([{"messages": CHAT[: 2 + 2 * (number % 2)]} for number in range(5)], None),
    "prompt_completion": (
        [{"prompt": f"{number} and 1 are", "completion": f" {number + 1}"} for number in range(5)],
        None,
    ),
    "alpaca": ([{"instruction": "Add the numbers.", "input": "2 and 3", "output": "5"}] * 4, None),
    "template": ([{"a": "1", "b": "2 3"}] * 4, RowFormat(template=TemplateLayout(template="{a} {b}"))),
}
CONFIG = TrainingConfig(max_steps=2, warmup_steps=0, batch_size=2, gradient_accumulation_steps=2)
# What a measurement adds, and what two looks at the same machine need not agree on.
MEASURED = ("memory_estimate_bytes", "memory_free_bytes", "memory_measured", "tokens_per_second", "step_seconds")


def plan(
    loaded: Loaded,
    rows: list[Row],
    config: TrainingConfig = CONFIG,
    *,
    eval_rows: list[Row] | None = None,
    row_format: RowFormat | None = None,
    measure: bool = False,
    preview_rows: int = 3,
    cancelled: threading.Event | None = None,
) -> TrainingPlan:
    training = StartTrainingRequest(
        training_id="plan",
        config=config,
        train_dataset=as_source(loaded.folder / "plan-rows.jsonl", rows, row_format),
        output_dir=str(loaded.folder / "planned"),
    )
    if eval_rows is not None:
        training.eval_dataset.CopyFrom(as_source(loaded.folder / "plan-eval.jsonl", eval_rows, None))
    request = PlanTrainingRequest(training=training, measure=measure, preview_rows=preview_rows)
    return loaded.engine.plan(request, cancelled or threading.Event())


def comparable(whole: TrainingPlan) -> TrainingPlan:
    copy = TrainingPlan()
    copy.CopyFrom(whole)
    for name in MEASURED:
        copy.ClearField(name)  # type: ignore[arg-type]
    return copy


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_the_plan_is_what_the_started_event_of_the_same_training_says(prepared: Loaded, layout: str) -> None:
    rows, row_format = LAYOUTS[layout]
    config = TrainingConfig(max_steps=1, optim="adamw_8bit", bf16=True, packing=True, eval_steps=1)
    planned = plan(prepared, rows, config, eval_rows=rows[:2], row_format=row_format)
    run = prepared.train(rows, config, eval_rows=rows[:2], row_format=row_format)
    assert comparable(planned) == comparable(run.plan)
    assert planned.row_format.WhichOneof("layout") == layout
    assert planned.mean_row_tokens == planned.num_tokens / planned.num_rows
    assert len(planned.preview) == 3
    assert planned.num_eval_rows == 2


def test_steps_of_epochs_and_warnings_of_rows_are_as_in_training(prepared: Loaded) -> None:
    rows = [{"messages": CHAT}] * 7 + [
        {"messages": CHAT[:1]},
        {"messages": [CHAT[0], {**CHAT[1], "content": "1 2 " * 200}]},
    ]
    config = TrainingConfig(num_train_epochs=2, warmup_steps=0, batch_size=2, gradient_accumulation_steps=2)
    planned = plan(prepared, rows, config)
    run = prepared.train(rows, config)
    assert comparable(planned) == comparable(run.plan)
    assert planned.total_steps == 4
    assert (planned.truncated_rows, planned.dropped_rows) == (1, 1)
    assert any("no assistant turn" in warning for warning in planned.warnings)


def test_as_many_rows_are_shown_as_were_asked_for(prepared: Loaded) -> None:
    rows = LAYOUTS["text"][0]
    assert [row.text for row in plan(prepared, rows, preview_rows=5).preview] == [
        row["text"] + "<|im_end|>" for row in rows
    ]
    assert len(plan(prepared, rows, preview_rows=1).preview) == 1


def test_a_measured_plan_has_memory_and_speed_of_real_steps(prepared: Loaded) -> None:
    planned = plan(prepared, LAYOUTS["text"][0], measure=True)
    assert planned.memory_measured
    assert planned.memory_estimate_bytes > 10**8
    assert planned.step_seconds > 0
    tokens = 2 * 2 * planned.longest_row_tokens
    assert planned.tokens_per_second == pytest.approx(tokens / planned.step_seconds)


def test_without_measuring_memory_is_estimated_and_speed_is_not(prepared: Loaded) -> None:
    planned = plan(prepared, LAYOUTS["text"][0])
    assert not planned.memory_measured
    assert planned.memory_estimate_bytes > 10**8
    assert not planned.HasField("step_seconds")
    assert not planned.HasField("tokens_per_second")


def weights(loaded: Loaded) -> dict[str, bytes]:
    return {name: value.detach().numpy().tobytes() for name, value in loaded.torch_model.named_parameters()}


@pytest.mark.parametrize("optim", ["adamw_8bit", "sgd", "rmsprop", "adagrad"])
def test_a_training_after_a_measured_plan_is_equal_to_the_bit(load: LoadTiny, optim: str) -> None:
    config = TrainingConfig(
        max_steps=3, warmup_steps=0, optim=optim, learning_rate=1e-3, weight_decay=0.1, neftune_noise_alpha=5
    )
    rows = LAYOUTS["text"][0]
    planned, plain = load(), load()
    for loaded in (planned, plain):
        loaded.prepare(LoraConfig(lora_dropout=0.1))
    plan(planned, rows, config, measure=True)
    assert weights(planned) == weights(plain)
    runs = [loaded.train(rows, config, name=name) for loaded, name in ((planned, "planned-run"), (plain, "plain-run"))]
    assert runs[0].losses == runs[1].losses
    assert weights(planned) == weights(plain)


def test_a_plan_leaves_no_trace_in_model_random_state_and_folders(prepared: Loaded) -> None:
    import numpy as np
    import torch

    model = prepared.torch_model
    model.eval()
    files = {*prepared.folder.rglob("*"), *Path.cwd().rglob("plan-*")}
    before = weights(prepared), [module.training for module in model.modules()], len(vars(model))

    def random_states() -> list[str]:
        return [str(random.getstate()), str(np.random.get_state()), str(torch.get_rng_state().tolist())]

    states = random_states()
    config = TrainingConfig(max_steps=2, neftune_noise_alpha=5, use_gradient_checkpointing=True)
    plan(prepared, LAYOUTS["chat"][0], config, measure=True)
    assert (weights(prepared), [module.training for module in model.modules()], len(vars(model))) == before
    assert random_states() == states
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules() if "Embedding" in type(module).__name__)
    new = {*prepared.folder.rglob("*"), *Path.cwd().rglob("plan-*")}
    assert {path.name for path in new - files} == {"plan-rows.jsonl"}


@pytest.mark.parametrize(
    ("limit", "advice"),
    [
        (2, "batch_size 2 with gradient_accumulation_steps 12"),
        (0, "use_gradient_checkpointing, a shorter max_seq_length"),
    ],
)
def test_a_probe_that_does_not_fit_is_a_warning_that_says_what_does(prepared: Loaded, limit: int, advice: str) -> None:
    config = TrainingConfig(
        max_steps=1, batch_size=8, gradient_accumulation_steps=3, use_gradient_checkpointing=False, warmup_steps=0
    )
    with memory(prepared, lambda _, ids: ids.shape[0] <= limit):
        planned = plan(prepared, LAYOUTS["text"][0], config, measure=True)
    assert advice in planned.warnings[-1]
    assert not planned.memory_measured
    assert planned.memory_estimate_bytes > 0
    assert planned.total_steps == 1
    prepared.train(LAYOUTS["text"][0])


def test_a_cancelled_plan_ends_at_the_next_row(prepared: Loaded) -> None:
    cancelled = threading.Event()
    cancelled.set()
    with pytest.raises(AbortedError, match="cancelled"):
        plan(prepared, LAYOUTS["text"][0], cancelled=cancelled)


PAIRS = {
    "texts": {"prompt": "2 and 3 are", "chosen": " 5", "rejected": " 6"},
    "turns": {"prompt": CHAT[:1], "chosen": CHAT[1:2], "rejected": [{"role": "assistant", "content": "No."}]},
    "conversations": {
        "chosen": CHAT[:2],
        "rejected": [CHAT[0], {"role": "assistant", "content": "No."}],
    },
}


@pytest.mark.parametrize("style", list(PAIRS))
def test_preference_pairs_are_planned_with_both_answers_and_not_trained(prepared: Loaded, style: str) -> None:
    planned = plan(prepared, [PAIRS[style]] * 2, measure=True, preview_rows=1)
    learnt = [row.text[row.loss_spans[0] : row.loss_spans[1]] for row in planned.preview]
    answers = [" 5", " 6"] if style == "texts" else ["I am fine, thank you.", "No."]
    assert learnt == [answer + "<|im_end|>" for answer in answers]
    assert planned.num_rows == 2
    assert planned.total_steps == 0
    assert "preference" in planned.warnings[-1]
    with pytest.raises(DatasetError, match="no method of this version trains on them") as raised:
        prepared.train([PAIRS[style]] * 2)
    assert raised.value.reason_name == "DATASET_COLUMNS"


def test_what_stops_a_training_stops_its_plan_in_the_same_words(prepared: Loaded) -> None:
    rows = [{"messages": CHAT[:1]}] * 2
    with pytest.raises(DatasetError, match="no assistant turn") as planned:
        plan(prepared, rows)
    with pytest.raises(DatasetError) as trained:
        prepared.train(rows)
    assert planned.value.message == trained.value.message
    assert planned.value.reason_name == "DATASET_EMPTY"


def test_an_eval_set_with_other_columns_is_refused_by_name(prepared: Loaded) -> None:
    with pytest.raises(DatasetError) as raised:
        plan(prepared, LAYOUTS["chat"][0], eval_rows=LAYOUTS["text"][0])
    assert raised.value.reason_name == "DATASET_COLUMNS"
    assert raised.value.metadata["dataset"] == "eval_dataset"
    assert raised.value.message.startswith("eval_dataset: ")


def test_a_plan_of_tuned_passes_says_them_once_they_were_measured(prepared: Loaded):
    rows, _ = LAYOUTS["text"]
    config = TrainingConfig()
    config.CopyFrom(CONFIG)
    config.micro_batching = MICRO_BATCHING_TUNED
    unknown = plan(prepared, rows, config)
    assert not unknown.HasField("passes")
    assert (unknown.config.batch_size, unknown.config.gradient_accumulation_steps) == (2, 2)
    assert unknown.memory_estimate_bytes == 0
    measured = plan(prepared, rows, config, measure=True)
    assert measured.passes.probe_seconds > 0
    assert measured.memory_measured
    remembered = plan(prepared, rows, config)
    assert remembered.passes.remembered
    assert remembered.passes.max_tokens == measured.passes.max_tokens
