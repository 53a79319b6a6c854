"""A training that is broken off and goes on, in another engine, is the unbroken one to the bit."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support.engine_runs import Loaded, LoadTiny, Row, Told, weights
from unslothd.v1.model_pb2 import LoraConfig
from unslothd.v1.training_event_pb2 import TrainingCancelled, TrainingEvent, TrainingSucceeded
from unslothd.v1.training_pb2 import TrainingConfig
from unslothd_server.errors import NotFoundError, PreconditionError
from unslothd_server.worker.ports import StopSignal, TrainingPaused

LORA = LoraConfig(r=4, lora_dropout=0.2)
SIX_STEPS = TrainingConfig(
    max_steps=6, warmup_steps=2, save_steps=3, learning_rate=5e-3, batch_size=2, gradient_accumulation_steps=1
)


@pytest.fixture
def fresh(load: LoadTiny) -> Callable[..., Loaded]:
    """A new engine whose process has drawn other random numbers meanwhile."""

    def prepare(*, seed: int = 7, **options: Any) -> Loaded:
        import torch

        loaded = load(**options)
        loaded.prepare(None if options.get("full_finetuning") else LORA, seed=seed)
        torch.rand(17)
        return loaded

    return prepare


def config(**changes: Any) -> TrainingConfig:
    merged = TrainingConfig()
    merged.CopyFrom(SIX_STEPS)
    if "num_train_epochs" in changes:
        merged.ClearField("max_steps")
    merged.MergeFrom(TrainingConfig(**changes))
    return merged


RESUMES = {
    "from the middle": (config(eval_steps=2), 3, {}),
    "from the end of an epoch": (config(save_steps=4), 4, {}),
    "with accumulation and a broken epoch": (
        config(num_train_epochs=2.5, save_steps=2, batch_size=1, gradient_accumulation_steps=3, eval_steps=3),
        4,
        {},
    ),
    "inside a logging interval": (config(max_steps=7, logging_steps=3, save_steps=2, eval_steps=2), 4, {}),
    "with noise on the embeddings": (config(neftune_noise_alpha=5.0), 3, {}),
    "with checkpointing": (config(use_gradient_checkpointing=True), 3, {}),
    "of all weights": (config(), 3, {"full_finetuning": True}),
}


@pytest.mark.parametrize("case", RESUMES.values(), ids=RESUMES)
def test_a_resumed_training_is_the_unbroken_one_to_the_bit(
    fresh: Callable[..., Loaded], texts: list[Row], case: tuple[TrainingConfig, int, dict[str, Any]]
) -> None:
    wanted, step, options = case
    eval_rows = texts[:3] if wanted.eval_steps else None
    whole = fresh(**options).train(texts, wanted, eval_rows=eval_rows, name="whole")
    # Another seed: the adapter's first weights must come from the checkpoint.
    rest = fresh(seed=99, **options).train(
        texts, wanted, eval_rows=eval_rows, name="rest", resume_from=whole.output_dir / f"checkpoint-{step}"
    )
    assert (rest.of("started")[0].resumed, rest.of("started")[0].first_step) == (True, step + 1)
    assert Told.by(rest) == Told.by(whole).after(step)
    assert weights(rest) == weights(whole)
    assert rest.result.metrics.train_loss == whole.result.metrics.train_loss
    assert rest.result.metrics.eval_loss == whole.result.metrics.eval_loss
    saved = [saved.step for saved in whole.of("checkpoint_saved") if saved.step > step]
    assert [saved.step for saved in rest.of("checkpoint_saved")] == saved


def pause_at(kind: str, step: int) -> Any:
    """Asks for a pause when an event of a kind and step arrives."""

    def on_event(event: TrainingEvent, stop: StopSignal) -> None:
        if event.WhichOneof("kind") == kind and getattr(getattr(event, kind), "step", 0) == step:
            stop.pause = True
            stop.requested.set()

    return on_event


PAUSES = {
    "between two saves": (config(eval_steps=2), "step", 3, 4),
    "inside an evaluation": (config(eval_steps=2), "step", 2, 2),
    "inside the last evaluation": (config(eval_steps=2), "step", 6, 6),
    "inside a logging interval": (config(max_steps=7, logging_steps=3, eval_steps=2), "evaluation", 4, 5),
    "where a step is saved anyway": (config(eval_steps=4), "step", 2, 3),
}


@pytest.mark.parametrize("case", PAUSES.values(), ids=PAUSES)
def test_a_paused_training_goes_on_as_if_there_had_been_no_pause(
    fresh: Callable[..., Loaded], texts: list[Row], case: tuple[TrainingConfig, str, int, int]
) -> None:
    wanted, kind, asked_at, paused_at = case
    whole = fresh().train(texts, wanted, eval_rows=texts, name="whole")
    first = fresh().train(texts, wanted, eval_rows=texts, name="run", on_event=pause_at(kind, asked_at))
    assert first.result == TrainingPaused(paused_at)
    assert first.of("checkpoint_saved")[-1].step == paused_at
    checkpoint = Path(first.of("checkpoint_saved")[-1].path)
    assert not (first.output_dir / "final").exists()
    rest = fresh(seed=99).train(texts, wanted, eval_rows=texts, name="run", resume_from=checkpoint)
    assert Told.by(first, rest) == Told.by(whole)
    assert weights(rest) == weights(whole)
    assert rest.result.metrics.train_loss == whole.result.metrics.train_loss
    assert rest.result.metrics.eval_loss == whole.result.metrics.eval_loss


def test_a_training_that_was_paused_before_its_first_step_begins_anew(
    fresh: Callable[..., Loaded], texts: list[Row]
) -> None:
    whole = fresh().train(texts, SIX_STEPS, eval_rows=texts, name="whole")
    for kind in ("started", "warning"):
        loaded = fresh()
        first = loaded.train(texts, config(optim="adamw_8bit"), name=kind, on_event=pause_at(kind, 0))
        assert first.result == TrainingPaused(0)
        assert first.of("checkpoint_saved") == []
    rest = fresh().train(texts, SIX_STEPS, eval_rows=texts, name="started")
    assert Told.by(rest) == Told.by(whole)
    assert weights(rest) == weights(whole)


def test_a_cancelled_training_that_saved_can_go_on_too(fresh: Callable[..., Loaded], texts: list[Row]) -> None:
    def cancel(event: TrainingEvent, stop: StopSignal) -> None:
        if event.WhichOneof("kind") == "step" and event.step.step == 3:
            stop.save_checkpoint = True
            stop.requested.set()

    whole = fresh().train(texts, SIX_STEPS, name="whole")
    first = fresh().train(texts, SIX_STEPS, name="run", on_event=cancel)
    assert isinstance(first.result, TrainingCancelled)
    rest = fresh().train(texts, SIX_STEPS, name="run", resume_from=first.output_dir / "checkpoint-4")
    assert Told.by(first, rest) == Told.by(whole)
    assert weights(rest) == weights(whole)
    assert not (rest.output_dir / "final.partial").exists()


# A rate at which float32 weights cannot change, so that no evaluation is better than the one before.
STANDSTILL = config(
    max_steps=20, eval_steps=1, save_steps=1, early_stopping_patience=3, learning_rate=1e-60, optim="sgd"
)


@pytest.mark.parametrize(("step", "steps_left"), [(1, [2, 3]), (2, [3]), (3, [])])
def test_early_stopping_counts_on_where_it_was(
    fresh: Callable[..., Loaded], texts: list[Row], step: int, steps_left: list[int]
) -> None:
    whole = fresh().train(texts, STANDSTILL, eval_rows=texts, name="whole")
    assert [s.step for s in whole.of("step")] == [1, 2, 3]
    rest = fresh().train(
        texts, STANDSTILL, eval_rows=texts, name="rest", resume_from=whole.output_dir / f"checkpoint-{step}"
    )
    assert isinstance(rest.result, TrainingSucceeded)
    assert [s.step for s in rest.of("step")] == steps_left


def test_early_stopping_inside_a_logging_interval_still_tells_its_last_steps(
    fresh: Callable[..., Loaded], texts: list[Row]
) -> None:
    wanted = config()
    wanted.CopyFrom(STANDSTILL)
    wanted.logging_steps = 2
    run = fresh().train(texts, wanted, eval_rows=texts)
    assert [step.step for step in run.of("step")] == [2, 3]
    assert run.of("checkpoint_saved")[-1].step == 3


def test_a_damaged_checkpoint_gives_way_to_the_one_before_and_that_is_said(
    fresh: Callable[..., Loaded], texts: list[Row]
) -> None:
    wanted = config(save_steps=2)
    whole = fresh().train(texts, wanted, name="run")
    before = weights(whole)
    newest, older = whole.output_dir / "checkpoint-4", whole.output_dir / "checkpoint-2"
    (newest / "optimizer.pt").write_bytes((newest / "optimizer.pt").read_bytes()[:-10])
    rest = fresh(seed=99).train(texts, wanted, name="run", resume_from=newest, fallbacks=[older])
    assert rest.of("started")[0].first_step == 3
    assert "checkpoint-4 cannot be used: optimizer.pt has" in rest.warnings["CHECKPOINT_DAMAGED"][0]
    assert "goes on from checkpoint-2" in rest.warnings["CHECKPOINT_DAMAGED"][0]
    assert Told.by(rest) == Told.by(whole).after(2)
    assert weights(rest) == before


def test_a_save_that_was_killed_does_not_count_and_is_made_again(
    fresh: Callable[..., Loaded], texts: list[Row], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import Trainer

    wanted = config(save_steps=2)
    whole = fresh().train(texts, wanted, name="whole")

    def killed(trainer: Any, output_dir: str) -> None:
        if trainer.state.global_step == 4:
            raise SystemExit("killed inside the save")
        save(trainer, output_dir)

    save = Trainer._save_rng_state
    loaded, told = fresh(), []
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_save_rng_state", killed)
        with pytest.raises(SystemExit):
            loaded.train(texts, wanted, name="run", on_event=lambda event, stop: told.append(event.WhichOneof("kind")))
    output_dir = loaded.folder / "run"
    assert told.count("checkpoint_saved") == 1
    assert (output_dir / "checkpoint-4" / "optimizer.pt").is_file()
    rest = fresh(seed=99).train(
        texts, wanted, name="run", resume_from=output_dir / "checkpoint-4", fallbacks=[output_dir / "checkpoint-2"]
    )
    assert "checkpoint-4 cannot be used: it has no manifest.json" in rest.warnings["CHECKPOINT_DAMAGED"][0]
    assert Told.by(rest) == Told.by(whole).after(2)
    assert weights(rest) == weights(whole)


def test_going_on_removes_what_is_made_again_and_what_was_never_finished(
    fresh: Callable[..., Loaded], texts: list[Row]
) -> None:
    wanted = config(save_steps=2)
    run = fresh().train(texts, wanted, name="run")
    (run.output_dir / "checkpoint-6" / "foreign.txt").write_text("left over")
    half = run.output_dir / "checkpoint-1"
    half.mkdir()
    (half / "adapter_model.safetensors").write_bytes(b"half")

    def look(event: TrainingEvent, stop: StopSignal) -> None:
        if event.HasField("started"):
            left.extend(sorted(path.name for path in run.output_dir.glob("checkpoint-*")))

    left: list[str] = []
    fresh().train(texts, wanted, name="run", resume_from=run.output_dir / "checkpoint-4", on_event=look)
    assert left == ["checkpoint-2", "checkpoint-4"]
    assert not (run.output_dir / "checkpoint-6" / "foreign.txt").exists()


def test_a_resume_from_nothing_that_is_whole_fails_and_touches_nothing(prepared: Loaded, texts: list[Row]) -> None:
    run = prepared.train(texts, SIX_STEPS, name="run")
    with pytest.raises(NotFoundError) as missing:
        prepared.train(texts, SIX_STEPS, name="run", resume_from=run.output_dir / "checkpoint-5")
    assert missing.value.reason_name == "CHECKPOINT_NOT_FOUND"
    for step in (3, 6):
        (run.output_dir / f"checkpoint-{step}" / "manifest.json").unlink()
    with pytest.raises(PreconditionError) as damaged:
        prepared.train(
            texts,
            SIX_STEPS,
            name="run",
            resume_from=run.output_dir / "checkpoint-6",
            fallbacks=[run.output_dir / "checkpoint-3"],
        )
    assert damaged.value.reason_name == "CHECKPOINT_DAMAGED"
    assert sorted(path.name for path in run.output_dir.iterdir()) == ["checkpoint-3", "checkpoint-6", "final", "runs"]
