"""The device always has something to do: a step is told while it runs the next one, and nobody else waits for it."""

import inspect
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import pytest

from support import engine_runs
from support.engine_runs import Loaded, Row, Run
from unslothd.v1.training_event_pb2 import TrainingEvent, TrainingSucceeded
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
# About 0.6 s.
SLEEP_CYCLES = 1_000_000_000

OnEvent = Callable[[TrainingEvent, StopSignal], None]


class Train(Protocol):
    """Trains with the defaults, in a folder of that name, a model that is the same every time."""

    def __call__(self, name: str, on_event: OnEvent, prepared: Callable[[Loaded], None] = ...) -> Run: ...


@pytest.fixture
def rows() -> list[Row]:
    """As many as the steps need; every one is longer than the model takes."""
    return [{"text": f"{number} is a number. " + "The quick fox jumps. " * 600} for number in range(8 * STEPS)]


@pytest.fixture
def train(base: Path, tmp_path: Path, rows: list[Row]) -> Train:
    def run(name: str, on_event: OnEvent, prepared: Callable[[Loaded], None] = nothing_else) -> Run:
        (tmp_path / name).mkdir()
        loaded = engine_runs.load(base, tmp_path / name, load_in_4bit=False, max_seq_length=MAX_SEQ_LENGTH)
        loaded.prepare(checkpointing=True)
        prepared(loaded)
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


def nothing_else(loaded: Loaded) -> None:
    """Leaves a model as it is."""


def nothing(event: TrainingEvent, stop: StopSignal) -> None:
    """Lets a training run."""


def last_layer(loaded: Loaded) -> Any:
    return loaded.torch_model.base_model.model.model.layers[-1]


@pytest.mark.whole_gpu
def test_a_step_is_told_while_the_device_runs_the_next_one(train: Train):
    import torch

    busy: dict[int, bool] = {}

    def slow_down(loaded: Loaded) -> None:
        """A backward pass takes the device longer than any host takes to launch it."""

        def after_forward(module: Any, inputs: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            if hidden.requires_grad:
                hidden.register_hook(lambda gradient: torch.cuda._sleep(SLEEP_CYCLES))

        last_layer(loaded).register_forward_hook(after_forward)

    def on_event(event: TrainingEvent, stop: StopSignal) -> None:
        if event.HasField("step"):
            busy[event.step.step] = not torch.cuda.current_stream().query()

    train("ahead", on_event, prepared=slow_down)
    print(f"busy when a step was told: {busy}")
    # The optimizer makes its states in the first step, and the device is done before; nothing follows the last one.
    between = [busy[step] for step in range(2, STEPS)]
    # A host that is held up tells a step when the device is done; without running ahead, it would tell all of them so.
    assert between.count(True) > len(between) / 2
    assert not busy[STEPS]


def test_no_layer_waits_for_the_device(train: Train):
    import torch

    watched = False

    def watch(loaded: Loaded) -> None:
        loaded.torch_model.register_forward_pre_hook(
            lambda *_: torch.cuda.set_sync_debug_mode("error" if watched else "default")
        )
        last_layer(loaded).register_forward_hook(lambda *_: torch.cuda.set_sync_debug_mode("default"))

    def on_event(event: TrainingEvent, stop: StopSignal) -> None:
        nonlocal watched
        watched = watched or event.HasField("step")

    try:
        done = train("watched", on_event, prepared=watch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert isinstance(done.result, TrainingSucceeded)
    assert watched


def test_the_figures_are_those_of_a_training_that_waits_for_every_step(train: Train, monkeypatch: pytest.MonkeyPatch):
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


def test_the_engine_itself_waits_for_the_device_nowhere_in_a_step(train: Train):
    import torch

    def on_event(event: TrainingEvent, stop: StopSignal) -> None:
        if event.HasField("step"):
            # The first step makes the optimizer's states; the last one ends with the training.
            torch.cuda.set_sync_debug_mode("warn" if 2 <= event.step.step < STEPS - 1 else "default")

    with waits_seen() as waits:
        train("watched", on_event)
    print(f"waits of {STEPS - 3} steps: {Counter(waits)}")
    # Nor do the optimizer, where Unsloth takes out that bitsandbytes waits after each parameter, and who sends batches.
    others = ("/unslothd_server/", "/bitsandbytes/", "/accelerate/")
    assert [place for place in waits if any(other in place for other in others)] == []
