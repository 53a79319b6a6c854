"""A training that is asked to stop, ends badly, or goes on from a checkpoint."""

import errno
import json
from pathlib import Path
from typing import Any

import pytest

from support.engine_runs import Loaded, LoadTiny, Row
from unslothd.v1.training_event_pb2 import TrainingCancelled, TrainingEvent, TrainingSucceeded
from unslothd.v1.training_pb2 import TrainingConfig
from unslothd_server.errors import ExhaustedError
from unslothd_server.worker.ports import StopSignal

LONG = TrainingConfig(max_steps=500, warmup_steps=0, save_steps=400, learning_rate=1e-3)


def stop_at(kind: str, *, step: int, save: bool) -> Any:
    """Asks to stop when an event of a kind and step arrives."""

    def on_event(event: TrainingEvent, stop: StopSignal) -> None:
        if event.WhichOneof("kind") == kind and getattr(getattr(event, kind), "step", 0) == step:
            stop.save_checkpoint = save
            stop.requested.set()

    return on_event


def test_a_cancel_ends_at_the_next_step_and_saves_nothing_unless_asked(prepared: Loaded, texts: list[Row]) -> None:
    run = prepared.train(texts, LONG, on_event=stop_at("step", step=2, save=False))
    assert run.result == TrainingCancelled(step=3, output_dir="")
    assert [step.step for step in run.of("step")] == [1, 2, 3]
    assert run.of("checkpoint_saved") == []
    assert {path.name for path in run.output_dir.iterdir()} == {"runs"}


def test_a_cancel_that_saves_leaves_a_checkpoint_and_the_adapter(prepared: Loaded, texts: list[Row]) -> None:
    run = prepared.train(texts, LONG, on_event=stop_at("step", step=2, save=True))
    assert run.result == TrainingCancelled(step=3, output_dir=str(run.output_dir / "final"))
    assert [saved.step for saved in run.of("checkpoint_saved")] == [3]
    assert (run.output_dir / "checkpoint-3" / "trainer_state.json").is_file()
    assert (run.output_dir / "final" / "adapter_model.safetensors").is_file()


def test_a_stop_before_the_rows_are_read_leaves_nothing(prepared: Loaded, texts: list[Row]) -> None:
    import threading

    stop = StopSignal(threading.Event(), save_checkpoint=True)
    stop.requested.set()
    run = prepared.train(texts, LONG, stop=stop)
    assert run.result == TrainingCancelled(step=0, output_dir="")
    assert run.events == []
    assert not run.output_dir.exists()


def test_a_stop_when_everything_is_ready_runs_no_step(prepared: Loaded, texts: list[Row]) -> None:
    run = prepared.train(texts, LONG, on_event=stop_at("started", step=0, save=True))
    assert run.result == TrainingCancelled(step=0, output_dir="")
    assert run.of("step") == []


def test_a_stop_does_not_wait_for_the_end_of_an_evaluation(
    prepared: Loaded, texts: list[Row], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = TrainingConfig(max_steps=500, warmup_steps=0, save_steps=400, eval_steps=3, batch_size=1)

    def on_event(event: TrainingEvent, stop: StopSignal) -> None:
        # Step 3 is logged, then evaluated: the request arrives before the first eval batch.
        if event.WhichOneof("kind") == "step" and event.step.step == 3:
            stop.save_checkpoint = True
            stop.requested.set()

    run = prepared.train(texts, config, eval_rows=texts, on_event=on_event)
    assert run.result == TrainingCancelled(step=3, output_dir=str(run.output_dir / "final"))
    assert [evaluation.step for evaluation in run.of("evaluation")] == [0]
    assert [saved.step for saved in run.of("checkpoint_saved")] == [3]


def test_a_stop_after_the_last_step_changes_nothing(prepared: Loaded, texts: list[Row]) -> None:
    config = TrainingConfig(max_steps=2, warmup_steps=0)
    run = prepared.train(texts, config, on_event=stop_at("checkpoint_saved", step=2, save=False))
    assert isinstance(run.result, TrainingSucceeded)


def test_a_model_trains_on_after_a_cancel(prepared: Loaded, texts: list[Row]) -> None:
    prepared.train(texts, LONG, name="first", on_event=stop_at("step", step=1, save=False))
    second = prepared.train(texts, TrainingConfig(max_steps=2, warmup_steps=0), name="second")
    assert isinstance(second.result, TrainingSucceeded)
    assert [step.step for step in second.of("step")] == [1, 2]


WHOLE = TrainingConfig(max_steps=6, warmup_steps=2, save_steps=3, learning_rate=5e-3, batch_size=2, eval_steps=2)
WHOLE.gradient_accumulation_steps = 1


def weights(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


def test_a_resumed_training_is_the_unbroken_one_to_the_bit(load: LoadTiny, texts: list[Row]) -> None:
    from unslothd.v1.model_pb2 import LoraConfig

    lora = LoraConfig(r=4, lora_dropout=0.2)
    unbroken, resumed = load(), load()
    unbroken.prepare(lora)
    resumed.prepare(lora, seed=99)
    whole = unbroken.train(texts, WHOLE, eval_rows=texts[:3], name="whole")
    rest = resumed.train(texts, WHOLE, eval_rows=texts[:3], name="rest", resume_from=whole.output_dir / "checkpoint-3")
    started = rest.of("started")[0]
    assert (started.resumed, started.first_step, started.plan.total_steps) == (True, 4, 6)
    assert [step.step for step in rest.of("step")] == [4, 5, 6]
    assert rest.losses == whole.losses[3:]
    assert weights(rest.output_dir / "final") == weights(whole.output_dir / "final")
    assert rest.of("step")[-1].tokens == whole.of("step")[-1].tokens
    assert rest.result.metrics.train_loss == pytest.approx(whole.result.metrics.train_loss, abs=1e-12)
    assert rest.result.metrics.eval_loss == whole.result.metrics.eval_loss


def test_a_resume_from_the_last_step_only_finishes(load: LoadTiny, texts: list[Row]) -> None:
    first, second = load(), load()
    first.prepare()
    second.prepare()
    whole = first.train(texts, WHOLE, name="whole")
    rest = second.train(texts, WHOLE, name="rest", resume_from=whole.output_dir / "checkpoint-6")
    assert isinstance(rest.result, TrainingSucceeded)
    assert rest.of("step") == []
    assert weights(rest.output_dir / "final") == weights(whole.output_dir / "final")
    assert rest.result.metrics.train_loss == pytest.approx(whole.result.metrics.train_loss, abs=1e-12)


def test_a_checkpoint_holds_what_a_resume_needs(prepared: Loaded, texts: list[Row]) -> None:
    run = prepared.train(texts, TrainingConfig(max_steps=1, warmup_steps=0))
    saved = Path(run.of("checkpoint_saved")[0].path)
    assert {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"} <= {f.name for f in saved.iterdir()}
    assert json.loads((saved / "trainer_state.json").read_text())["global_step"] == 1


@pytest.mark.parametrize(
    ("error", "reason", "remedy"),
    [
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9 bytes"), "OUT_OF_MEMORY", "batch"),
        (MemoryError(), "OUT_OF_MEMORY", "batch_size"),
        (OSError(errno.ENOSPC, "No space left on device"), "DISK_FULL", "ResumeTraining"),
    ],
    ids=["allocator", "python", "disk"],
)
def test_running_out_of_memory_or_disk_is_told_with_what_helps(
    prepared: Loaded, texts: list[Row], error: Exception, reason: str, remedy: str
) -> None:
    def fail(event: TrainingEvent, stop: StopSignal) -> None:
        if event.WhichOneof("kind") == "step":
            raise error

    with pytest.raises(ExhaustedError) as raised:
        prepared.train(texts, LONG, on_event=fail)
    assert raised.value.reason_name == reason
    assert remedy in raised.value.message
    again = prepared.train(texts, TrainingConfig(max_steps=1, warmup_steps=0), name="again")
    assert isinstance(again.result, TrainingSucceeded)


def test_a_bug_is_not_dressed_up_as_something_else(prepared: Loaded, texts: list[Row]) -> None:
    def fail(event: TrainingEvent, stop: StopSignal) -> None:
        raise ZeroDivisionError("a bug")

    with pytest.raises(ZeroDivisionError):
        prepared.train(texts, LONG, on_event=fail)
