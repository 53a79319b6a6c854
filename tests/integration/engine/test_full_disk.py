"""Real Unsloth on a disk that fills up: training goes on where it can, and what was saved before is there after."""

import errno
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from support.engine_runs import Loaded, LoadTiny, Row
from support.full_disk import limit_files
from unslothd.v1.training_event_pb2 import TrainingEvent, TrainingSucceeded
from unslothd.v1.training_pb2 import TrainingConfig
from unslothd_server.engine import checkpoints
from unslothd_server.errors import ExhaustedError
from unslothd_server.worker.ports import StopSignal

CONFIG = TrainingConfig(max_steps=8, warmup_steps=0, learning_rate=1e-2, save_steps=2)
# Less than the optimizer's state, of two float32 for each trained parameter; more than any other file of a run.
ADAPTER_FITS = 200_000
NOTHING_FITS = 30_000

OnEvent = Callable[[TrainingEvent, StopSignal], None]


@pytest.fixture(autouse=True)
def room_again() -> Iterator[None]:
    yield
    limit_files(None)


def prepared(load: LoadTiny) -> Loaded:
    loaded = load()
    loaded.prepare()
    return loaded


def full_from(step: int, num_bytes: int, *, until: int | None = None) -> OnEvent:
    """Fills the disk after a step, and frees it again after a later one."""

    def on_event(event: TrainingEvent, stop: StopSignal) -> None:
        if event.HasField("step") and event.step.step == step:
            limit_files(num_bytes)
        if event.HasField("step") and event.step.step == until:
            limit_files(None)

    return on_event


def saved(run: Any) -> list[int]:
    return [each.step for each in run.of("checkpoint_saved")]


def folders(output_dir: Path) -> set[str]:
    return {path.name for path in output_dir.iterdir()}


def adapter(output_dir: Path) -> bytes:
    return (output_dir / "final" / "adapter_model.safetensors").read_bytes()


def test_a_checkpoint_that_finds_no_room_is_told_and_training_goes_on_to_the_same_result(
    load: LoadTiny, texts: list[Row]
):
    unbroken = prepared(load).train(texts, CONFIG, name="unbroken")
    run = prepared(load).train(texts, CONFIG, on_event=full_from(3, ADAPTER_FITS, until=7))
    (first, second) = run.warnings["CHECKPOINT_NOT_SAVED"]
    assert first.startswith("The checkpoint of step 4 was not saved, and training goes on.")
    assert f"The disk that holds {run.output_dir} is full" in first
    assert "KiB needed" in first
    assert "would be done again from step 3 on" in second
    assert saved(run) == [2, 8]
    assert folders(run.output_dir) == {"checkpoint-2", "checkpoint-8", "final", "runs"}
    assert (run.losses, adapter(run.output_dir)) == (unbroken.losses, adapter(unbroken.output_dir))


def test_a_result_that_finds_room_where_the_last_checkpoint_does_not_is_a_success(load: LoadTiny, texts: list[Row]):
    run = prepared(load).train(texts, CONFIG, on_event=full_from(5, ADAPTER_FITS))
    assert isinstance(run.result, TrainingSucceeded)
    assert saved(run) == [2, 4]
    assert len(run.warnings["CHECKPOINT_NOT_SAVED"]) == 2
    assert folders(run.output_dir) == {"checkpoint-2", "checkpoint-4", "final", "runs"}


def test_a_result_that_finds_no_room_fails_with_what_to_free_and_a_resume_gives_the_same_bits(
    load: LoadTiny, texts: list[Row]
):
    unbroken = prepared(load).train(texts, CONFIG, name="unbroken")
    output_dir = unbroken.output_dir.with_name("out")
    with pytest.raises(ExhaustedError) as raised:
        prepared(load).train(texts, CONFIG, on_event=full_from(5, NOTHING_FITS))
    limit_files(None)
    assert raised.value.reason_name == "DISK_FULL"
    assert str(output_dir) in raised.value.message
    assert "Free some space, then go on with ResumeTraining" in raised.value.message
    assert raised.value.metadata["path"] == str(output_dir)
    assert folders(output_dir) == {"checkpoint-2", "checkpoint-4", "runs"}
    assert checkpoints.verify(output_dir / "checkpoint-4") is None
    rest = prepared(load).train(texts, CONFIG, resume_from=output_dir / "checkpoint-4")
    assert (rest.losses, adapter(output_dir)) == (unbroken.losses[4:], adapter(unbroken.output_dir))


def test_a_pause_that_cannot_be_saved_is_a_failure_and_not_a_pause(load: LoadTiny, texts: list[Row]):
    def on_event(event: TrainingEvent, stop: StopSignal) -> None:
        if event.HasField("step") and event.step.step == 3:
            limit_files(NOTHING_FITS)
            stop.pause = True
            stop.requested.set()

    with pytest.raises(ExhaustedError) as raised:
        prepared(load).train(texts, CONFIG, on_event=on_event)
    assert raised.value.reason_name == "DISK_FULL"


def test_curves_that_find_no_room_end_and_the_training_does_not(
    load: LoadTiny, texts: list[Row], monkeypatch: pytest.MonkeyPatch
):
    from torch.utils.tensorboard import SummaryWriter

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(SummaryWriter, "flush", full)
    run = prepared(load).train(texts, CONFIG)
    assert isinstance(run.result, TrainingSucceeded)
    assert len(run.warnings["TENSORBOARD_STOPPED"]) == 1
