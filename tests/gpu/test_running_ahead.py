"""The device always has something to do: a step is told while it runs the next one, and nobody else waits for it."""

import inspect
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from support import engine_runs
from support.engine_runs import Row, Run
from unslothd.v1.training_event_pb2 import TrainingEvent
from unslothd.v1.training_pb2 import MICRO_BATCHING_TUNED, TrainingConfig
from unslothd_server.worker.ports import StopSignal

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(540)]

MAX_SEQ_LENGTH = 2048
STEPS = 8
TUNED = TrainingConfig(
    max_steps=STEPS, warmup_steps=2, learning_rate=2e-4, micro_batching=MICRO_BATCHING_TUNED, save_steps=100
)
# Atomic additions round in another order each time.
RELATIVE_DIFFERENCE = 2e-3

OnEvent = Callable[[TrainingEvent, StopSignal], None]


@pytest.fixture
def rows() -> list[Row]:
    """As many as the steps need; every one is longer than the model takes."""
    return [{"text": f"{number} is a number. " + "The quick fox jumps. " * 600} for number in range(8 * STEPS)]


@pytest.fixture
def train(base: Path, tmp_path: Path, rows: list[Row]) -> Callable[[str, OnEvent], Run]:
    """Trains with the defaults, in a folder of that name, a model that is the same every time."""

    def run(name: str, on_event: OnEvent) -> Run:
        (tmp_path / name).mkdir()
        loaded = engine_runs.load(base, tmp_path / name, load_in_4bit=False, max_seq_length=MAX_SEQ_LENGTH)
        loaded.prepare(checkpointing=True)
        done = loaded.train(rows, TUNED, on_event=on_event)
        loaded.engine._loaded = None  # gives the device back before the next model comes
        return done

    return run


@contextmanager
def waits_seen() -> Iterator[list[str]]:
    """Files and lines that wait for the device while `torch.cuda.set_sync_debug_mode("warn")` holds; there at the end.

    torch warns of every call that does but two: waits for an event, which are meant, and `torch.cuda.synchronize`.
    """
    import torch

    places: list[str] = []
    really = torch.cuda.synchronize

    def synchronize(*arguments: object) -> None:
        if torch.cuda.get_sync_debug_mode():
            caller = inspect.stack()[1]
            places.append(f"{caller.filename}:{caller.lineno}")
        really(*arguments)

    with warnings.catch_warnings(record=True) as caught, pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("always")
        patch.setattr(torch.cuda, "synchronize", synchronize)
        try:
            yield places
        finally:
            torch.cuda.set_sync_debug_mode("default")
    places += [f"{each.filename}:{each.lineno}" for each in caught if "synchronizing" in str(each.message)]


def nothing(event: TrainingEvent, stop: StopSignal) -> None:
    """Lets a training run."""


def test_a_step_is_told_while_the_device_runs_the_next_one(train: Callable[[str, OnEvent], Run]):
    import torch

    busy: dict[int, bool] = {}

    def on_event(event: TrainingEvent, stop: StopSignal) -> None:
        if event.HasField("step"):
            busy[event.step.step] = not torch.cuda.current_stream().query()

    train("ahead", on_event)
    assert busy == {step: step < STEPS for step in range(1, STEPS + 1)}


def test_the_figures_are_those_of_a_training_that_waits_for_every_step(
    train: Callable[[str, OnEvent], Run], monkeypatch: pytest.MonkeyPatch
):
    from support.readings import at_once
    from unslothd_server.engine import service_trainer

    ahead = train("ahead", nothing)
    monkeypatch.setattr(service_trainer, "Reading", at_once())
    waiting = train("waiting", nothing)
    assert ahead.kinds == waiting.kinds
    assert ahead.losses == pytest.approx(waiting.losses, rel=RELATIVE_DIFFERENCE)
    for name in ("step", "tokens", "learning_rate", "epoch"):
        assert [getattr(step, name) for step in ahead.of("step")] == [
            getattr(step, name) for step in waiting.of("step")
        ]
    seconds = [[round(step.step_seconds, 3) for step in run.of("step")] for run in (ahead, waiting)]
    print(f"seconds a step: ahead {seconds[0]}, waiting {seconds[1]}")


def test_the_engine_itself_waits_for_the_device_nowhere_in_a_step(
    train: Callable[[str, OnEvent], Run],
):
    import torch

    def on_event(event: TrainingEvent, stop: StopSignal) -> None:
        if event.HasField("step"):
            # The first step makes the optimizer's states; the last one ends with the training.
            torch.cuda.set_sync_debug_mode("warn" if 2 <= event.step.step < STEPS - 1 else "default")

    with waits_seen() as waits:
        train("watched", on_event)
    print(f"waits of {STEPS - 3} steps: {Counter(waits)}")
    # Nor does the optimizer: bitsandbytes waits after each parameter, which Unsloth takes out.
    assert [place for place in waits if "/unslothd_server/" in place or "/bitsandbytes/" in place] == []
