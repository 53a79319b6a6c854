"""Tuned passes: the same optimizer steps, split as a probe or an earlier training found best."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from support.engine_runs import Loaded, LoadTiny, Row, Run, memory
from unslothd.v1.model_pb2 import LoraConfig
from unslothd.v1.training_event_pb2 import TrainingEvent, TrainingPreparing
from unslothd.v1.training_pb2 import MICRO_BATCHING_TUNED, TrainingConfig
from unslothd_server.engine import preparation, recorded_passes
from unslothd_server.engine.micro_batching import Choice, Split, StepSizes
from unslothd_server.engine.readback import uses_checkpointing
from unslothd_server.worker.ports import StopSignal, TrainingPaused

FIXED = TrainingConfig(
    max_steps=4, warmup_steps=0, learning_rate=1e-3, batch_size=2, gradient_accumulation_steps=3, save_steps=2
)
TUNED = TrainingConfig()
TUNED.CopyFrom(FIXED)
TUNED.micro_batching = MICRO_BATCHING_TUNED
# Rounding in float32 with other sizes of passes.
RELATIVE_DIFFERENCE = 1e-4

Step = list[tuple[int, ...]]


@pytest.fixture
def mixed() -> list[Row]:
    """Twenty different rows of 10 to 128 tokens."""
    return [{"text": f"{number} is a number. " + "The fox jumps. " * (number % 9)} for number in range(20)]


@pytest.fixture
def fresh(load: LoadTiny, tmp_path: Path) -> Callable[[], Loaded]:
    """The same model and adapter every time."""

    def make() -> Loaded:
        loaded = load()
        loaded.prepare(LoraConfig(r=4))
        return loaded

    return make


@contextmanager
def steps_seen(loaded: Loaded) -> Iterator[list[Step]]:
    """The sequences of each optimizer step, sorted; what a probe runs before the first one is not counted."""
    seen: list[Step] = []

    def before(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        ids, mask = kwargs["input_ids"], kwargs["attention_mask"]
        seen[-1].extend(tuple(row[kept.bool()].tolist()) for row, kept in zip(ids, mask, strict=True))

    hook = loaded.torch_model.register_forward_pre_hook(before, with_kwargs=True)
    seen.append([])
    try:
        yield seen
    finally:
        hook.remove()


def trained(loaded: Loaded, rows: list[Row], config: TrainingConfig, **options: Any) -> tuple[Run, list[Step]]:
    with steps_seen(loaded) as seen:

        def on_event(event: TrainingEvent, stop: StopSignal) -> None:
            if event.HasField("started"):
                seen.clear()
            if event.HasField("started") or event.HasField("step"):
                seen.append([])

        run = loaded.train(rows, config, on_event=on_event, **options)
    return run, [sorted(step) for step in seen if step]


def test_tuned_steps_have_the_rows_of_fixed_ones_and_their_losses(fresh: Callable[[], Loaded], mixed: list[Row]):
    fixed, fixed_steps = trained(fresh(), mixed, FIXED)
    tuned, tuned_steps = trained(fresh(), mixed, TUNED)
    assert len(fixed_steps) == 4
    assert tuned_steps == fixed_steps
    assert tuned.losses == pytest.approx(fixed.losses, rel=RELATIVE_DIFFERENCE)
    norms = [[step.grad_norm for step in run.of("step")] for run in (tuned, fixed)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)
    assert [step.tokens for step in tuned.of("step")] == [step.tokens for step in fixed.of("step")]


def test_the_started_event_says_what_was_chosen_and_what_it_was_chosen_by(
    fresh: Callable[[], Loaded], mixed: list[Row]
):
    plan = trained(fresh(), mixed, TUNED)[0].plan
    assert plan.config.micro_batching == MICRO_BATCHING_TUNED
    assert plan.config.batch_size * plan.config.gradient_accumulation_steps >= 6
    assert plan.config.use_gradient_checkpointing == plan.passes.use_gradient_checkpointing
    assert plan.memory_measured
    assert plan.passes.max_tokens >= plan.longest_row_tokens
    assert plan.passes.step_seconds > 0
    assert plan.passes.tokens_per_second > 0
    assert plan.passes.probe_seconds > 0
    assert not plan.passes.remembered
    assert not plan.passes.costs[0].use_gradient_checkpointing


def test_what_was_measured_is_remembered_by_another_worker_and_measured_anew_for_another_adapter(
    fresh: Callable[[], Loaded], load: LoadTiny, mixed: list[Row]
):
    first = trained(fresh(), mixed, TUNED, name="first")[0].plan.passes
    second = trained(fresh(), mixed, TUNED, name="second")[0].plan.passes
    assert (first.remembered, second.remembered) == (False, True)
    assert list(second.costs) == list(first.costs)
    assert second.probe_seconds == 0
    other = load()
    other.prepare(LoraConfig(r=8))
    assert not trained(other, mixed, TUNED, name="third")[0].plan.passes.remembered


def test_a_damaged_memory_of_costs_is_measured_anew(fresh: Callable[[], Loaded], mixed: list[Row], tmp_path: Path):
    trained(fresh(), mixed, TUNED, name="first")
    (file,) = (tmp_path / "cache" / "passes").iterdir()
    file.write_text("[{")
    assert not trained(fresh(), mixed, TUNED, name="second")[0].plan.passes.remembered


def test_passes_that_do_not_fit_are_not_chosen(fresh: Callable[[], Loaded], mixed: list[Row]):
    loaded = fresh()
    with memory(loaded, lambda loaded, ids: ids.numel() <= 300):
        run, steps = trained(loaded, mixed, TUNED)
    assert run.plan.passes.max_tokens <= 300
    assert run.of("recovery") == []
    assert steps == trained(fresh(), mixed, FIXED, name="fixed")[1]


def test_rows_and_passes_before_the_first_step_are_told_while_they_last(
    fresh: Callable[[], Loaded], mixed: list[Row], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(preparation, "QUIET_SECONDS", 0.0)
    monkeypatch.setattr(preparation, "TELL_SECONDS", 0.0)
    run = fresh().train(mixed, TUNED)
    told = [(each.phase, each.done) for each in run.of("preparing")]
    rows, passes = TrainingPreparing.PHASE_READING_ROWS, TrainingPreparing.PHASE_MEASURING_PASSES
    assert [phase for phase, _ in told] == sorted(phase for phase, _ in told)
    assert [done for phase, done in told if phase == rows] == list(range(len(mixed)))
    assert [done for phase, done in told if phase == passes][:2] == [0, 1]


def test_where_only_one_row_fits_larger_passes_with_checkpointing_are_measured_too(
    fresh: Callable[[], Loaded], mixed: list[Row]
):
    loaded = fresh()
    with memory(loaded, lambda loaded, ids: ids.shape[0] <= 1 or uses_checkpointing(loaded.torch_model)):
        run, _steps = trained(loaded, mixed, TUNED)
    assert [cost.use_gradient_checkpointing for cost in run.plan.passes.costs] == [False, True]
    assert run.of("recovery") == []


def test_where_no_measured_pass_fits_the_training_begins_with_checkpointing(
    fresh: Callable[[], Loaded], mixed: list[Row]
):
    loaded = fresh()
    begun: list[bool] = []

    def on_event(event: TrainingEvent, stop: StopSignal) -> None:
        if event.HasField("started"):
            begun.append(True)

    # A probe leaves a margin free, which the training may use.
    with memory(loaded, lambda loaded, ids: bool(begun) and uses_checkpointing(loaded.torch_model)):
        run = loaded.train(mixed, TUNED, on_event=on_event)
    assert not run.plan.HasField("passes")
    assert run.plan.config.use_gradient_checkpointing
    assert run.of("recovery") == []
    assert len(run.losses) == TUNED.max_steps


def test_a_choice_that_stops_fitting_is_repaired_at_the_same_steps(fresh: Callable[[], Loaded], mixed: list[Row]):
    fixed = fresh().train(mixed, FIXED, name="fixed")
    loaded = fresh()
    begun: list[bool] = []

    def on_event(event: TrainingEvent, stop: StopSignal) -> None:
        if event.HasField("started"):
            begun.append(True)

    with memory(loaded, lambda loaded, ids: not begun or ids.shape[0] <= 1):
        run = loaded.train(mixed, TUNED, on_event=on_event)
    repairs = run.of("recovery")
    assert repairs
    assert repairs[-1].config.batch_size == 1
    assert run.losses == pytest.approx(fixed.losses, rel=RELATIVE_DIFFERENCE)


def test_a_paused_training_goes_on_with_its_choice(fresh: Callable[[], Loaded], mixed: list[Row]):
    whole = trained(fresh(), mixed, TUNED, name="whole")[0]
    stop = StopSignal(threading.Event())

    def pause(event: TrainingEvent, stop: StopSignal) -> None:
        if event.HasField("step") and event.step.step == 1:
            stop.pause = True
            stop.requested.set()

    broken = fresh().train(mixed, TUNED, name="broken", stop=stop, on_event=pause)
    assert isinstance(broken.result, TrainingPaused)
    rest = fresh().train(mixed, TUNED, name="broken", resume_from=broken.output_dir / "checkpoint-2")
    assert broken.losses + rest.losses == pytest.approx(whole.losses, rel=RELATIVE_DIFFERENCE)
    assert not rest.plan.HasField("passes")
    assert rest.plan.config == broken.plan.config


def test_what_was_recorded_is_forgotten_when_the_training_has_ended(
    prepared: Loaded, mixed: list[Row], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Launches are recorded on a GPU only: tests/gpu/test_tuned_passes.py looks at the memory.
    forgotten: list[Any] = []
    monkeypatch.setattr(recorded_passes, "may_have_recorded", lambda trainer: trainer.model is prepared.torch_model)
    monkeypatch.setattr(recorded_passes, "forget_recorded", forgotten.append)
    prepared.train(mixed, FIXED)
    assert forgotten == [prepared.torch_model]


def test_a_step_of_fewer_rows_is_filled_up_where_shapes_are_recorded_and_learns_the_same(
    fresh: Callable[[], Loaded], mixed: list[Row], monkeypatch: pytest.MonkeyPatch
):
    def whole_steps(costs: Any, sizes: StepSizes, room: float) -> Choice:
        split = Split(sizes.budget(sizes.sequences, joined=False), joined=False, checkpointing=False)
        return Choice(split, seconds=1.0, num_bytes=0.0, saved_in_one=0.0, tokens=1.0)

    # Twenty rows: the last step of an epoch has two.
    tuned, fixed, shapes = TrainingConfig(num_train_epochs=2), TrainingConfig(num_train_epochs=2), [(0, 0)]
    for config, like in ((tuned, TUNED), (fixed, FIXED)):
        config.MergeFrom(like)
        config.ClearField("max_steps")
    expected = fresh().train(mixed, fixed, name="fixed")
    monkeypatch.setattr("unslothd_server.engine.pass_tuning.choose", whole_steps)
    monkeypatch.setattr("unslothd_server.engine.pass_tuning.may_have_recorded", lambda trainer: True)
    loaded = fresh()

    def begin(event: TrainingEvent, stop: StopSignal) -> None:
        if event.HasField("started"):
            shapes.clear()

    def before(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        shapes.append(tuple(kwargs["input_ids"].shape))

    hook = loaded.torch_model.register_forward_pre_hook(before, with_kwargs=True)
    run = loaded.train(mixed, tuned, on_event=begin)
    hook.remove()
    assert len(run.losses) == len(shapes) == 8
    assert {rows for rows, _width in shapes} == {6}
    assert run.losses == pytest.approx(expected.losses, rel=RELATIVE_DIFFERENCE)
    assert [step.tokens for step in run.of("step")] == [step.tokens for step in expected.of("step")]
