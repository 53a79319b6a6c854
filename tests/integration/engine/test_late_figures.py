"""A device that is behind: a step is told once it is done, with the next one launched already, and nothing is lost."""

from collections.abc import Callable
from typing import Any

import pytest

from support.engine_runs import Loaded, LoadTiny, Row, Told, memory, weights
from support.readings import Late, Soon
from unslothd.v1.model_pb2 import LoraConfig
from unslothd.v1.training_event_pb2 import TrainingEvent
from unslothd.v1.training_pb2 import TrainingConfig
from unslothd_server.engine.transfers import Reading
from unslothd_server.errors import ExhaustedError
from unslothd_server.worker.ports import StopSignal, TrainingPaused

FOUR_STEPS = TrainingConfig(
    max_steps=4, warmup_steps=0, learning_rate=5e-3, batch_size=2, gradient_accumulation_steps=2, save_steps=100
)


@pytest.fixture
def device(versions: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Callable[[type[Reading]], None]:
    """Makes figures of steps come as a kind of reading has them."""
    return lambda reading: monkeypatch.setattr("unslothd_server.engine.service_trainer.Reading", reading)


@pytest.fixture
def fresh(load: LoadTiny) -> Callable[[], Loaded]:
    """The same model and adapter every time."""

    def make() -> Loaded:
        loaded = load()
        loaded.prepare(LoraConfig(r=4, lora_dropout=0.2))
        return loaded

    return make


def config(**changes: Any) -> TrainingConfig:
    merged = TrainingConfig()
    merged.CopyFrom(FOUR_STEPS)
    merged.MergeFrom(TrainingConfig(**changes))
    return merged


def in_order(loaded: Loaded, rows: list[Row], asked: TrainingConfig) -> list[str]:
    """Passes as they begin, and steps as they are told."""
    seen: list[str] = []
    hook = loaded.torch_model.register_forward_pre_hook(lambda *_: seen.append("pass"))

    def on_event(event: TrainingEvent, stop: StopSignal) -> None:
        if event.HasField("step"):
            seen.append(f"step {event.step.step}")

    try:
        loaded.train(rows, asked, on_event=on_event)
    finally:
        hook.remove()
    return seen


def test_the_passes_of_the_next_step_are_launched_before_a_step_is_told(
    fresh: Callable[[], Loaded], texts: list[Row], device: Callable[[type[Reading]], None]
):
    device(Late)
    told = in_order(fresh(), texts, config(max_steps=3))
    both = ["pass", "pass"]
    # Nothing follows the last step, so it is told at its end.
    assert told == [*both, *both, "step 1", *both, "step 2", "step 3"]


def test_a_step_is_told_between_passes_as_soon_as_the_device_has_done_it(
    fresh: Callable[[], Loaded], texts: list[Row], device: Callable[[type[Reading]], None]
):
    device(Soon)
    told = in_order(fresh(), texts, config(max_steps=3))
    both = ["pass", "pass"]
    assert told == [*both, "step 1", *both, "step 2", *both, "step 3"]


@pytest.mark.parametrize(
    "asked",
    [
        config(),
        config(eval_steps=2, save_steps=3),
        config(logging_steps=3, max_steps=7),
        config(max_steps=6, batch_size=1, gradient_accumulation_steps=3, save_steps=2),
    ],
    ids=["steps only", "with evaluations and checkpoints", "with fewer logs", "over epochs"],
)
def test_late_figures_are_those_of_a_run_that_waits(
    fresh: Callable[[], Loaded], texts: list[Row], device: Callable[[type[Reading]], None], asked: TrainingConfig
):
    evaluated = {"eval_rows": texts[:3]} if asked.eval_steps else {}
    waiting = fresh().train(texts, asked, name="waiting", **evaluated)
    device(Late)
    late = fresh().train(texts, asked, name="late", **evaluated)
    assert late.kinds == waiting.kinds
    assert Told.by(late) == Told.by(waiting)
    assert late.result.metrics.train_loss == waiting.result.metrics.train_loss
    assert weights(late) == weights(waiting)


def test_a_pause_and_a_resume_with_late_figures_are_the_unbroken_training(
    fresh: Callable[[], Loaded], texts: list[Row], device: Callable[[type[Reading]], None]
):
    unbroken = fresh().train(texts, config(), name="unbroken")
    device(Late)

    def pause(event: TrainingEvent, stop: StopSignal) -> None:
        if event.HasField("step"):
            stop.pause = True
            stop.requested.set()

    first = fresh().train(texts, config(), name="broken", on_event=pause)
    # The second step was under way when the first was told.
    assert first.result == TrainingPaused(2)
    rest = fresh().train(texts, config(), name="broken", resume_from=first.output_dir / "checkpoint-2")
    assert Told.by(first, rest) == Told.by(unbroken)
    assert weights(rest) == weights(unbroken)


def test_a_step_is_told_before_the_recovery_of_the_one_after_it(
    fresh: Callable[[], Loaded], texts: list[Row], device: Callable[[type[Reading]], None]
):
    device(Late)
    loaded = fresh()
    passes: list[int] = []

    def fits(_: Loaded, ids: Any) -> bool:
        passes.append(ids.shape[0])
        return len(passes) <= 4 or ids.shape[0] == 1

    with memory(loaded, fits):
        run = loaded.train(texts, config())
    told = [kind for kind in run.kinds if kind in ("step", "recovery")]
    assert told == ["step", "step", "recovery", "step", "step"]
    assert [each.resume_step for each in run.of("recovery")] == [2]


def test_a_training_that_fails_has_told_every_step_that_was_done(
    fresh: Callable[[], Loaded], texts: list[Row], device: Callable[[type[Reading]], None]
):
    device(Late)
    loaded = fresh()
    passes: list[int] = []
    events: list[TrainingEvent] = []

    def fits(_: Loaded, ids: Any) -> bool:
        passes.append(ids.shape[0])
        return len(passes) <= 4

    with memory(loaded, fits), pytest.raises(ExhaustedError):
        loaded.train(texts, config(), on_event=lambda event, stop: events.append(event))
    assert [event.step.step for event in events if event.HasField("step")] == [1, 2]


def test_figures_of_a_device_are_as_they_were_when_their_step_ended(versions: dict[str, str]) -> None:
    import torch

    class OnDevice:
        """A tensor that says it is on a GPU; what is launched for it runs at once."""

        is_cuda = True

        def __init__(self, tensor: Any) -> None:
            self.tensor = tensor

        def detach(self) -> Any:
            return self.tensor

    loss, tokens = torch.tensor(0.1), torch.tensor([2**40 + 1])
    reading = Reading([OnDevice(loss), 3.5, OnDevice(tokens)])
    loss.zero_()
    tokens.zero_()
    assert reading.values() == [float(torch.tensor(0.1)), 3.5, 2**40 + 1]
