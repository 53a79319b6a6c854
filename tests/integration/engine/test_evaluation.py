"""Evaluations: they change nothing, name the best, keep its checkpoint, and survive a lack of memory."""

from collections.abc import Callable
from typing import Any

import pytest

from support.engine_runs import Loaded, LoadTiny, Row
from unslothd.v1.model_pb2 import LoraConfig
from unslothd.v1.training_event_pb2 import TrainingSucceeded
from unslothd.v1.training_pb2 import TrainingConfig

FOUR_STEPS = TrainingConfig(max_steps=4, warmup_steps=0, learning_rate=5e-3, batch_size=4, eval_steps=2)

# What helps on the one kind of rows soon hurts on the other.
GETS_WORSE = TrainingConfig(max_steps=8, warmup_steps=0, learning_rate=5e-2)
OTHER_ROWS = [{"text": "0 1 2 3 4 5 6 7 8 9 " * 3}]


@pytest.fixture
def dropping(load: LoadTiny) -> Callable[[], Loaded]:
    """A new engine whose adapter drops out, so that every random number counts."""

    def prepare() -> Loaded:
        loaded = load()
        loaded.prepare(LoraConfig(r=4, lora_dropout=0.2))
        return loaded

    return prepare


def fail_from(loaded: Loaded, sequences: int, *, only: list[int] | None = None) -> list[int]:
    """Makes an evaluation pass of that many sequences or more run out of memory. Returns the sizes of all passes.

    Args:
        loaded: Engine with the model.
        sequences: Smallest number that does not fit.
        only: Numbers of the passes that fail, counted from 0; None = all.
    """
    import torch

    seen: list[int] = []

    def hook(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if module.training:
            return
        size = int(kwargs["input_ids"].shape[0])
        seen.append(size)
        if size >= sequences and (only is None or len(seen) - 1 in only):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB.")

    loaded.torch_model.register_forward_pre_hook(hook, with_kwargs=True)
    return seen


def test_an_evaluation_moves_no_number_of_the_training(dropping: Callable[[], Loaded], texts: list[Row]) -> None:
    without = dropping().train(texts, FOUR_STEPS, name="without")
    watched = dropping().train(texts, FOUR_STEPS, eval_rows=texts, name="with")
    assert watched.losses == without.losses
    final = "final/adapter_model.safetensors"
    assert (watched.output_dir / final).read_bytes() == (without.output_dir / final).read_bytes()


def test_an_evaluation_that_does_not_fit_is_done_with_smaller_passes(
    dropping: Callable[[], Loaded], texts: list[Row]
) -> None:
    undisturbed = dropping().train(texts, FOUR_STEPS, eval_rows=texts, name="undisturbed")
    loaded = dropping()
    # The second pass fails: what the first one summed up must not count twice.
    seen = fail_from(loaded, 2, only=[1, 2])
    run = loaded.train(texts, FOUR_STEPS, eval_rows=texts, name="disturbed")
    assert isinstance(run.result, TrainingSucceeded)
    assert seen[:3] == [4, 4, 2]
    assert set(seen[3:]) == {1}
    (warning,) = run.warnings["EVAL_OUT_OF_MEMORY"]
    assert warning.startswith("The evaluation after step 0 ran out of memory with 4 sequences a pass")
    assert "again with 1" in warning
    assert run.losses == undisturbed.losses
    losses = [evaluation.eval_loss for evaluation in run.of("evaluation")]
    assert losses == pytest.approx([evaluation.eval_loss for evaluation in undisturbed.of("evaluation")], abs=1e-5)


def test_an_evaluation_that_cannot_be_done_is_left_out_and_training_goes_on(
    dropping: Callable[[], Loaded], texts: list[Row]
) -> None:
    undisturbed = dropping().train(texts, FOUR_STEPS, name="undisturbed")
    loaded = dropping()
    fail_from(loaded, 1)
    wanted = TrainingConfig(early_stopping_patience=1)
    wanted.MergeFrom(FOUR_STEPS)
    run = loaded.train(texts, wanted, eval_rows=texts, name="disturbed")
    assert isinstance(run.result, TrainingSucceeded)
    assert run.of("evaluation") == []
    assert [message.split(":")[0] for message in run.warnings["EVAL_OUT_OF_MEMORY"]] == [
        f"The evaluation after step {step} was left out" for step in (0, 2, 4)
    ]
    assert run.losses == undisturbed.losses
    assert not run.result.metrics.HasField("eval_loss")
    assert not run.of("checkpoint_saved")[-1].HasField("eval_loss")


def test_one_evaluation_left_out_does_not_lend_its_checkpoint_the_loss_of_another(
    prepared: Loaded, texts: list[Row]
) -> None:
    # Passes: 2 at step 0; at step 2 one fails at each of the sizes 4, 2 and 1; then at step 4 all is well again.
    fail_from(prepared, 1, only=[2, 3, 4])
    wanted = TrainingConfig(save_steps=2, early_stopping_patience=1)
    wanted.MergeFrom(FOUR_STEPS)
    run = prepared.train(texts, wanted, eval_rows=texts)
    assert [evaluation.step for evaluation in run.of("evaluation")] == [0, 4]
    assert [saved.HasField("eval_loss") for saved in run.of("checkpoint_saved")] == [False, True]


def test_another_error_in_an_evaluation_is_not_taken_for_a_lack_of_memory(prepared: Loaded, texts: list[Row]) -> None:
    def hook(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if not module.training:
            raise ZeroDivisionError("a bug")

    prepared.torch_model.register_forward_pre_hook(hook, with_kwargs=True)
    with pytest.raises(ZeroDivisionError):
        prepared.train(texts, FOUR_STEPS, eval_rows=texts)


def test_the_best_evaluation_is_named_and_its_checkpoint_outlives_the_limit(prepared: Loaded, texts: list[Row]) -> None:
    wanted = TrainingConfig(eval_steps=1, save_steps=2, save_total_limit=2)
    wanted.MergeFrom(GETS_WORSE)
    run = prepared.train(texts, wanted, eval_rows=OTHER_ROWS)
    losses = {evaluation.step: evaluation.eval_loss for evaluation in run.of("evaluation")}
    for evaluation in run.of("evaluation"):
        assert evaluation.best == (evaluation.eval_loss <= min(losses[step] for step in range(evaluation.step + 1)))
    saved = {saved.step: saved.eval_loss for saved in run.of("checkpoint_saved")}
    assert saved == {step: losses[step] for step in (2, 4, 6, 8)}
    best = min(saved, key=lambda step: saved[step])
    assert best == 2
    left = sorted(path.name for path in run.output_dir.glob("checkpoint-*"))
    assert left == ["checkpoint-2", "checkpoint-6", "checkpoint-8"]


def test_early_stopping_ends_after_as_many_evaluations_without_gain_as_it_has_patience(
    prepared: Loaded, texts: list[Row]
) -> None:
    wanted = TrainingConfig(eval_steps=1, early_stopping_patience=3)
    wanted.MergeFrom(GETS_WORSE)
    run = prepared.train(texts, wanted, eval_rows=OTHER_ROWS)
    losses = [evaluation.eval_loss for evaluation in run.of("evaluation")]
    best = losses.index(min(losses))
    assert len(losses) == best + 1 + 3
    assert run.of("step")[-1].step == best + 3
