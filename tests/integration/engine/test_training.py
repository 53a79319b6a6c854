"""A training by real Unsloth: its events, its figures, its folder, and the config that it really has."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from support.engine_runs import Loaded, LoadTiny, Row, Run
from unslothd.v1.training_event_pb2 import TrainingSucceeded
from unslothd.v1.training_pb2 import MICRO_BATCHING_FIXED, TrainingConfig
from unslothd_server.errors import DatasetError


def mean_loss(model: Any, tokenizer: Any, rows: list[Row]) -> float:
    """Mean over all learnt tokens, by plain PyTorch."""
    import torch

    total, count = 0.0, 0
    model.eval()
    with torch.no_grad():
        for row in rows:
            ids = torch.tensor([[*tokenizer(row["text"])["input_ids"], tokenizer.eos_token_id]])
            logits = model(input_ids=ids).logits
            losses = torch.nn.functional.cross_entropy(logits[0, :-1].float(), ids[0, 1:], reduction="none")
            total, count = total + float(losses.sum()), count + len(losses)
    return total / count


def test_a_training_tells_everything_in_order_and_leaves_an_adapter(prepared: Loaded, texts: list[Row]) -> None:
    config = TrainingConfig(max_steps=4, warmup_steps=0, save_steps=2, learning_rate=5e-3)
    run = prepared.train(texts, config, eval_rows=texts[:3])
    assert [kind for kind in run.kinds if kind != "warning"] == [
        "started",
        "evaluation",
        "step",
        "step",
        "checkpoint_saved",
        "step",
        "step",
        "evaluation",
        "checkpoint_saved",
    ]
    assert isinstance(run.result, TrainingSucceeded)
    assert run.result.output_dir == str(run.output_dir / "final")
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json"} <= {
        path.name for path in (run.output_dir / "final").iterdir()
    }
    assert not list((run.output_dir / "final").glob("*.bin"))
    assert {path.name for path in run.output_dir.iterdir()} == {"checkpoint-2", "checkpoint-4", "final", "runs"}


def test_the_started_event_has_the_whole_plan(prepared: Loaded, texts: list[Row]) -> None:
    run = prepared.train(texts, eval_rows=texts[:3])
    started = run.of("started")[0]
    plan = started.plan
    lengths = [len(prepared.tokenizer(row["text"])["input_ids"]) + 1 for row in texts]
    assert plan.num_rows == len(texts)
    assert plan.num_tokens == sum(lengths)
    assert plan.loss_tokens == sum(lengths) - len(texts)
    assert plan.longest_row_tokens == max(lengths)
    assert plan.num_eval_rows == 3
    assert plan.total_steps == 2
    assert plan.trainable_params == 32_768
    assert [row.text for row in plan.preview] == [row["text"] + "<|im_end|>" for row in texts[:3]]
    assert plan.row_format.text.column == "text"
    assert plan.row_format.completion_only_loss is False
    assert started.first_step == 1
    assert not started.resumed
    assert started.device == "cpu"
    assert started.engine.startswith("unsloth 20")
    assert started.tensorboard_dir == str(run.output_dir / "runs")


def test_every_step_has_every_figure(prepared: Loaded, texts: list[Row]) -> None:
    config = TrainingConfig(
        max_steps=4, warmup_steps=2, learning_rate=1e-3, batch_size=2, gradient_accumulation_steps=2
    )
    run = prepared.train(texts, config)
    steps = run.of("step")
    assert [step.step for step in steps] == [1, 2, 3, 4]
    assert [step.total_steps for step in steps] == [4, 4, 4, 4]
    assert [step.epoch for step in steps] == [0.5, 1.0, 1.5, 2.0]
    assert [step.learning_rate for step in steps][:3] == pytest.approx([0.0, 5e-4, 1e-3])
    # Two passes over the rows see each of their tokens twice: padding is not counted.
    assert steps[-1].tokens == 2 * run.plan.num_tokens
    for step, last in zip(steps, [None, *steps], strict=False):
        new_tokens = step.tokens - (last.tokens if last else 0)
        assert step.grad_norm > 0
        assert step.step_seconds > 0
        assert step.tokens_per_second == pytest.approx(new_tokens / step.step_seconds)
        assert step.eta_seconds == pytest.approx((4 - step.step) * step.step_seconds)
        assert 10**8 < step.memory_bytes <= step.peak_memory_bytes


def test_the_loss_is_the_mean_over_tokens_however_the_step_is_split(load: LoadTiny, texts: list[Row]) -> None:
    expected: float | None = None
    for batch_size, passes in [(8, 1), (2, 4), (1, 8)]:
        loaded = load()
        loaded.prepare()
        expected = expected or mean_loss(loaded.torch_model, loaded.tokenizer, texts)
        config = TrainingConfig(max_steps=1, warmup_steps=0, batch_size=batch_size, gradient_accumulation_steps=passes)
        run = loaded.train(texts, config, name=f"batch-{batch_size}")
        assert run.losses == [pytest.approx(expected, abs=1e-5)]


def test_with_fewer_logs_a_step_event_is_the_mean_of_its_interval(load: LoadTiny, texts: list[Row]) -> None:
    every, each = load(), load()
    every.prepare()
    each.prepare()
    common = {"max_steps": 5, "warmup_steps": 0, "learning_rate": 5e-3}
    fine = every.train(texts, TrainingConfig(**common), name="fine")
    coarse = each.train(texts, TrainingConfig(logging_steps=2, **common), name="coarse")
    # The last step is always logged.
    assert [step.step for step in coarse.of("step")] == [2, 4, 5]
    losses = fine.losses
    means = [(losses[0] + losses[1]) / 2, (losses[2] + losses[3]) / 2, losses[4]]
    assert coarse.losses == pytest.approx(means, abs=1e-6)
    assert coarse.result.metrics.train_loss == pytest.approx(sum(losses) / 5, abs=1e-6)
    assert coarse.of("step")[-1].tokens == fine.of("step")[-1].tokens


def test_evaluation_runs_before_between_and_at_the_end_and_weighs_tokens(prepared: Loaded, texts: list[Row]) -> None:
    config = TrainingConfig(max_steps=5, warmup_steps=0, eval_steps=2, learning_rate=1e-2, batch_size=2)
    before = mean_loss(prepared.torch_model, prepared.tokenizer, texts[:5])
    run = prepared.train(texts, config, eval_rows=texts[:5])
    after = mean_loss(prepared.torch_model, prepared.tokenizer, texts[:5])
    evaluations = run.of("evaluation")
    assert [evaluation.step for evaluation in evaluations] == [0, 2, 4, 5]
    assert evaluations[0].eval_loss == pytest.approx(before, abs=1e-5)
    assert evaluations[-1].eval_loss == pytest.approx(after, abs=1e-5)
    assert after < before
    assert [evaluation.best for evaluation in evaluations] == [True, True, True, True]
    for evaluation in evaluations:
        assert evaluation.perplexity == pytest.approx(math.exp(evaluation.eval_loss))
        assert evaluation.seconds > 0
    metrics = run.result.metrics
    assert metrics.eval_loss == evaluations[-1].eval_loss
    assert run.of("checkpoint_saved")[-1].eval_loss == evaluations[-1].eval_loss
    assert metrics.train_tokens == run.of("step")[-1].tokens
    assert metrics.train_runtime > 0
    assert metrics.train_tokens_per_second == pytest.approx(metrics.train_tokens / metrics.train_runtime)
    assert metrics.train_loss == pytest.approx(sum(run.losses) / 5)
    assert metrics.epoch == run.of("step")[-1].epoch
    assert metrics.peak_memory_bytes >= run.of("step")[-1].peak_memory_bytes


def test_without_an_eval_dataset_no_eval_loss_is_made_up(prepared: Loaded, texts: list[Row]) -> None:
    run = prepared.train(texts)
    assert run.of("evaluation") == []
    assert not run.result.metrics.HasField("eval_loss")
    assert not run.of("checkpoint_saved")[0].HasField("eval_loss")


# Every field of the config, with a value that is not its default and that a CPU can have.
EVERY_FIELD = TrainingConfig(
    learning_rate=3e-3,
    batch_size=3,
    gradient_accumulation_steps=2,
    warmup_steps=1,
    max_steps=3,
    output_dir="my/output",
    fp16=False,
    bf16=False,
    logging_steps=2,
    save_steps=2,
    optim="adafactor",
    weight_decay=0.05,
    lr_scheduler_type="linear",
    seed=123,
    use_gradient_checkpointing=False,
    packing=False,
    max_grad_norm=0.5,
    eval_steps=2,
    save_total_limit=1,
    early_stopping_patience=5,
    neftune_noise_alpha=5.0,
    micro_batching=MICRO_BATCHING_FIXED,
)


def test_every_field_of_the_config_is_read_back_from_the_trainer(prepared: Loaded, texts: list[Row]) -> None:
    run = prepared.train(texts, EVERY_FIELD, eval_rows=texts[:2])
    assert run.plan.config == EVERY_FIELD
    assert run.warnings == {}
    # The newest checkpoint is kept; the best one is the newest here.
    assert sorted(path.name for path in run.output_dir.glob("checkpoint-*")) == ["checkpoint-3"]


def test_epochs_take_the_place_of_steps(prepared: Loaded, texts: list[Row]) -> None:
    config = TrainingConfig(num_train_epochs=1.5, warmup_steps=0, batch_size=2, gradient_accumulation_steps=1)
    run = prepared.train(texts, config)
    assert run.plan.config.num_train_epochs == 1.5
    assert not run.plan.config.HasField("max_steps")
    assert run.plan.total_steps == 6
    assert run.result.metrics.epoch == 1.5


def test_fields_that_are_not_set_take_the_documented_defaults(prepared: Loaded, texts: list[Row]) -> None:
    config = prepared.train(texts, TrainingConfig(max_steps=1)).plan.config
    assert config.learning_rate == 2e-4
    assert (config.batch_size, config.gradient_accumulation_steps, config.warmup_steps) == (2, 4, 10)
    assert (config.logging_steps, config.save_steps, config.weight_decay) == (1, 100, 0.01)
    assert (config.lr_scheduler_type, config.seed, config.max_grad_norm) == ("cosine", 42, 1.0)
    assert config.use_gradient_checkpointing
    assert not config.packing
    assert (config.fp16, config.bf16) == (False, False)


def test_what_the_trainer_does_otherwise_than_asked_is_a_warning_each(prepared: Loaded, texts: list[Row]) -> None:
    config = TrainingConfig(
        max_steps=1,
        warmup_steps=0,
        optim="paged_adamw_8bit",
        packing=True,
        fp16=True,
    )
    run = prepared.train(texts, config)
    real = run.plan.config
    assert (real.optim, real.packing, real.fp16) == ("adamw_torch_fused", False, False)
    assert real.micro_batching == MICRO_BATCHING_FIXED
    assert "paged_adamw_8bit" in run.warnings["OPTIMIZER_REPLACED"][0]
    assert [message.split()[0] for message in run.warnings["CONFIG_DIFFERS"]] == ["fp16", "packing"]
    assert list(run.plan.warnings) == [warning.message for warning in run.of("warning")]


@pytest.mark.parametrize("optim", ["adamw_8bit", "ademamix", "lion_32bit", "rmsprop", "rmsprop_bnb", "adagrad", "sgd"])
def test_every_kind_of_optimizer_trains_or_is_replaced_and_said(prepared: Loaded, texts: list[Row], optim: str) -> None:
    before = fingerprint(prepared)
    run = prepared.train(texts, TrainingConfig(max_steps=2, warmup_steps=0, optim=optim, learning_rate=1e-3))
    assert fingerprint(prepared) != before
    assert (run.plan.config.optim != optim) == ("OPTIMIZER_REPLACED" in run.warnings)


@pytest.mark.parametrize(
    "scheduler",
    ["linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt"],
)
def test_every_scheduler_trains(prepared: Loaded, texts: list[Row], scheduler: str) -> None:
    config = TrainingConfig(max_steps=2, warmup_steps=1, lr_scheduler_type=scheduler, learning_rate=1e-7)
    run = prepared.train(texts, config)
    assert run.plan.config.lr_scheduler_type == scheduler
    assert run.warnings == {}


@pytest.mark.parametrize("wanted", [True, False])
def test_checkpointing_is_as_asked_whatever_prepare_said(load: LoadTiny, texts: list[Row], wanted: bool) -> None:
    loaded = load()
    loaded.prepare(checkpointing=not wanted)
    run = loaded.train(texts, TrainingConfig(max_steps=1, use_gradient_checkpointing=wanted))
    assert run.plan.config.use_gradient_checkpointing is wanted


def test_early_stopping_ends_a_training_that_gets_no_better(prepared: Loaded, texts: list[Row]) -> None:
    config = TrainingConfig(
        max_steps=50, warmup_steps=0, eval_steps=1, early_stopping_patience=2, learning_rate=1e-12, optim="sgd"
    )
    run = prepared.train(texts, config, eval_rows=texts[:2])
    assert isinstance(run.result, TrainingSucceeded)
    last = run.of("step")[-1].step
    assert last < 10
    assert run.of("checkpoint_saved")[-1].step == last


def test_settings_without_an_effect_are_said(prepared: Loaded, texts: list[Row]) -> None:
    run = prepared.train(texts, TrainingConfig(max_steps=1, eval_steps=5))
    assert any("eval_steps" in message for message in run.warnings["CONFIG_DIFFERS"])


def test_the_seed_decides_the_order_of_the_rows(load: LoadTiny, texts: list[Row]) -> None:
    runs: list[Run] = []
    for name, seed in [("a", 1), ("b", 1), ("c", 2)]:
        loaded = load()
        loaded.prepare()
        config = TrainingConfig(max_steps=2, warmup_steps=0, seed=seed, batch_size=1, gradient_accumulation_steps=1)
        runs.append(loaded.train(texts, config, name=name))
    assert runs[0].losses == runs[1].losses
    assert runs[0].losses != runs[2].losses


def fingerprint(loaded: Loaded) -> float:
    return sum(float(p.detach().double().abs().sum()) for p in loaded.torch_model.parameters() if p.requires_grad)


def test_a_second_training_goes_on_from_the_first_with_nothing_left_over(prepared: Loaded, texts: list[Row]) -> None:
    config = TrainingConfig(max_steps=3, warmup_steps=0, learning_rate=5e-3)
    first = prepared.train(texts, config, eval_rows=texts, name="first")
    second = prepared.train(texts, config, eval_rows=texts, name="second")
    assert [step.step for step in second.of("step")] == [1, 2, 3]
    assert second.of("evaluation")[0].eval_loss == pytest.approx(first.of("evaluation")[-1].eval_loss, abs=1e-6)
    assert second.of("evaluation")[-1].eval_loss < second.of("evaluation")[0].eval_loss
    assert second.of("step")[-1].tokens == first.of("step")[-1].tokens
    assert all(parameter.grad is None for parameter in prepared.torch_model.parameters())


def test_rows_that_were_cut_or_left_out_are_counted_and_said(prepared: Loaded) -> None:
    long_prompt = "0 1 2 3 4 5 6 7 8 9 " * 20
    rows = [
        {"prompt": "1 2 ", "completion": "3"},
        {"prompt": "1 2 ", "completion": long_prompt},
        {"prompt": long_prompt, "completion": "3"},
    ]
    run = prepared.train(rows, TrainingConfig(max_steps=1))
    plan = run.plan
    assert (plan.num_rows, plan.truncated_rows, plan.dropped_rows, plan.longest_row_tokens) == (2, 1, 1, 128)
    assert "1 of 2 rows" in run.warnings["ROWS_TRUNCATED"][0]
    assert "1 of 3 rows" in run.warnings["ROWS_DROPPED"][0]
    assert [row.truncated for row in plan.preview] == [False, True]


def test_rows_of_which_nothing_is_learnt_are_refused(prepared: Loaded) -> None:
    with pytest.raises(DatasetError) as raised:
        prepared.train([{"messages": [{"role": "user", "content": "hi"}]}])
    assert raised.value.reason_name == "DATASET_EMPTY"
    assert not (prepared.folder / "out").exists()


def test_nothing_is_written_before_the_rows_are_known_to_be_good(prepared: Loaded, texts: list[Row]) -> None:
    with pytest.raises(DatasetError, match="Row 9"):
        prepared.train([*texts, {"text": None}])
    with pytest.raises(DatasetError, match="Row 1"):
        prepared.train(texts, eval_rows=[{"text": 5}])
    assert not (prepared.folder / "out").exists()


def test_tensorboard_has_a_point_for_every_logged_step(prepared: Loaded, texts: list[Row]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = prepared.train(texts, TrainingConfig(max_steps=5, warmup_steps=0), eval_rows=texts[:2])
    events = EventAccumulator(str(run.output_dir / "runs"))
    events.Reload()
    points = events.Scalars("train/loss")
    assert [point.step for point in points] == [1, 2, 3, 4, 5]
    assert [point.value for point in points] == pytest.approx(run.losses, rel=1e-5)
    assert [point.step for point in events.Scalars("eval/loss")] == [0, 5]
    assert [path.is_file() for path in Path(run.output_dir / "runs").iterdir()] == [True]


def test_rows_that_are_tokenised_and_cut_are_not_rewritten_by_the_trainer(
    prepared: Loaded, texts: list[Row], monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("it would take minutes for many rows, and on a large host processes that are forked")

    monkeypatch.setattr(datasets.Dataset, "map", refuse)
    run = prepared.train(texts, eval_rows=texts[:3])
    assert len(run.losses) == 2


def test_unsloth_takes_our_word_that_no_row_is_longer_than_the_model(versions: dict[str, str]) -> None:
    """On a GPU it joins rows without padding only then. The name of the word is its own, and private."""
    from datasets import Dataset
    from unsloth.models.rl import _attested_within_cap

    from unslothd_server.engine.trainer import _say_cut

    rows = Dataset.from_list([{"input_ids": [1, 2, 3]}])
    assert not _attested_within_cap(rows, 128)
    _say_cut(rows, 128)
    assert _attested_within_cap(rows, 128)


def test_the_parameters_of_a_model_are_counted_once_for_the_operations_of_all_passes(
    prepared: Loaded, texts: list[Row], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, counted = prepared.torch_model, []
    count = model.num_parameters

    def counting(*args: Any, **kwargs: Any) -> int:
        counted.append(kwargs)
        return count(*args, **kwargs)

    monkeypatch.setattr(model, "num_parameters", counting)
    config = TrainingConfig(max_steps=3, warmup_steps=0, batch_size=1, gradient_accumulation_steps=2, save_steps=3)
    run = prepared.train(texts, config)
    assert counted == [{"exclude_embeddings": True}]
    state = json.loads((run.output_dir / "checkpoint-3" / "trainer_state.json").read_text())
    # One row a pass has no padding.
    assert state["total_flos"] == 6 * run.of("step")[-1].tokens * count(exclude_embeddings=True)
