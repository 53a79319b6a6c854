"""Real Unsloth, made to run out of memory at chosen passes: the training goes on, at the same optimizer steps."""

import pytest
import torch

from support.engine_runs import Fits, Loaded, LoadTiny, Row, memory
from unslothd.v1.training_pb2 import TrainingConfig
from unslothd_server.errors import ExhaustedError

CONFIG = TrainingConfig(
    max_steps=5,
    warmup_steps=0,
    learning_rate=1e-2,
    batch_size=4,
    gradient_accumulation_steps=2,
    use_gradient_checkpointing=False,
    save_steps=3,
)


def prepared(load: LoadTiny) -> Loaded:
    loaded = load()
    loaded.prepare()
    return loaded


def rows_up_to(most: int) -> Fits:
    return lambda loaded, ids: ids.shape[0] <= most


def uses_checkpointing(loaded: Loaded) -> bool:
    return any(getattr(module, "gradient_checkpointing", False) for module in loaded.torch_model.modules())


def test_passes_are_halved_and_the_losses_are_those_of_a_run_that_fits(load: LoadTiny, texts: list[Row]):
    unbroken = prepared(load).train(texts, CONFIG)
    loaded = prepared(load)
    with memory(loaded, rows_up_to(1)):
        run = loaded.train(texts, CONFIG, name="repaired")
    assert run.losses == pytest.approx(unbroken.losses, rel=1e-4)
    repairs = run.of("recovery")
    assert [(each.attempt, each.resume_step) for each in repairs] == [(1, 0), (2, 0)]
    assert [(each.config.batch_size, each.config.gradient_accumulation_steps) for each in repairs] == [(2, 4), (1, 8)]
    assert "out of memory" in repairs[0].cause.message
    assert [step.tokens for step in run.of("step")] == [step.tokens for step in unbroken.of("step")]


def test_memory_that_runs_out_in_the_middle_of_a_step_repeats_that_step(load: LoadTiny, texts: list[Row]):
    unbroken = prepared(load).train(texts, CONFIG)
    loaded = prepared(load)
    passes: list[int] = []

    def fits(_: Loaded, ids: torch.Tensor) -> bool:
        passes.append(ids.shape[0])
        return len(passes) < 6 or ids.shape[0] <= 2  # two steps of two passes, the third step's first, then no more

    with memory(loaded, fits):
        run = loaded.train(texts, CONFIG, name="repaired")
    assert run.losses == pytest.approx(unbroken.losses, rel=1e-4)
    assert [each.resume_step for each in run.of("recovery")] == [2]


def test_checkpointing_comes_on_when_one_sequence_does_not_fit(load: LoadTiny, texts: list[Row]):
    unbroken = prepared(load).train(texts, CONFIG)
    loaded = prepared(load)
    with memory(loaded, lambda each, ids: ids.shape[0] == 1 and uses_checkpointing(each)):
        run = loaded.train(texts, CONFIG, name="repaired")
    assert run.losses == pytest.approx(unbroken.losses, rel=1e-4)
    assert [each.config.use_gradient_checkpointing for each in run.of("recovery")] == [False, False, True]


def test_what_does_not_fit_at_all_fails_and_says_what_helps(load: LoadTiny, texts: list[Row]):
    loaded = prepared(load)
    with memory(loaded, lambda *_: False), pytest.raises(ExhaustedError) as caught:
        loaded.train(texts, CONFIG)
    assert caught.value.reason_name == "OUT_OF_MEMORY"
    assert "shorter" in caught.value.message


def test_a_resume_begins_with_the_passes_that_fitted(load: LoadTiny, texts: list[Row]):
    loaded = prepared(load)
    with memory(loaded, rows_up_to(2)):
        first = loaded.train(texts, CONFIG)
    again = prepared(load)
    with memory(again, rows_up_to(2)):
        run = again.train(texts, CONFIG, resume_from=first.output_dir / "checkpoint-3")
    assert run.of("recovery") == []
    assert run.plan.config.batch_size == 2
    assert run.losses == pytest.approx(first.losses[3:], rel=1e-5)
