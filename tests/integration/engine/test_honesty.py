"""Is it training? Each sign that nothing is learnt, brought about by a real cause."""

from typing import Any

from support.engine_runs import Loaded, LoadTiny, Row
from unslothd.v1.training_event_pb2 import TrainingSucceeded
from unslothd.v1.training_pb2 import TrainingConfig

SIGNS = ("ZERO_GRADIENTS", "NOT_FINITE", "LEARNING_RATE_ZERO", "ADAPTER_UNCHANGED")


def signs(run: Any) -> list[str]:
    return [warning.reason for warning in run.of("warning") if warning.reason in SIGNS]


def test_a_training_that_learns_has_none_of_the_signs(prepared: Loaded, texts: list[Row]) -> None:
    assert signs(prepared.train(texts, TrainingConfig(max_steps=3, warmup_steps=1))) == []


def test_a_warm_up_that_is_longer_than_the_training_is_told_before_the_first_step(
    prepared: Loaded, texts: list[Row]
) -> None:
    run = prepared.train(texts, TrainingConfig(max_steps=1, warmup_steps=10))
    assert signs(run) == ["LEARNING_RATE_ZERO", "ADAPTER_UNCHANGED"]
    assert "warmup_steps = 10" in run.warnings["LEARNING_RATE_ZERO"][0]
    assert run.kinds.index("warning") < run.kinds.index("step")
    assert run.of("step")[0].learning_rate == 0.0


def test_updates_that_are_lost_to_rounding_are_told_at_the_end(load: LoadTiny, texts: list[Row]) -> None:
    loaded = load(full_finetuning=True, dtype="bfloat16")
    loaded.prepare()
    run = loaded.train(texts, TrainingConfig(max_steps=3, warmup_steps=0, learning_rate=1e-12, optim="sgd"))
    assert signs(run) == ["ADAPTER_UNCHANGED"]
    assert "After 3 steps every trainable weight is bit for bit" in run.warnings["ADAPTER_UNCHANGED"][0]


def test_gradients_that_are_zero_are_told_once(prepared: Loaded, texts: list[Row]) -> None:
    import torch

    # A dead adapter: with A and B both zero neither ever gets a gradient.
    for name, parameter in prepared.torch_model.named_parameters():
        if "lora_" in name:
            torch.nn.init.zeros_(parameter)
    run = prepared.train(texts, TrainingConfig(max_steps=3, warmup_steps=0))
    assert signs(run) == ["ZERO_GRADIENTS", "ADAPTER_UNCHANGED"]
    assert run.warnings["ZERO_GRADIENTS"][0].startswith("Step 1:")


def test_figures_that_are_not_finite_are_told_and_again_when_it_lasts(prepared: Loaded, texts: list[Row]) -> None:
    # So high a rate that the weights overflow.
    wanted = TrainingConfig(max_steps=30, warmup_steps=0, learning_rate=1.0, optim="sgd", max_grad_norm=0)
    import torch

    for name, parameter in prepared.torch_model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.constant_(parameter, 1e30)
    run = prepared.train(texts, wanted)
    assert isinstance(run.result, TrainingSucceeded)
    first, lasting = run.warnings["NOT_FINITE"]
    assert first.startswith("Step 1:")
    assert lasting.startswith("Step 20:")
    assert "will not recover" in lasting


def test_one_loss_that_is_not_a_number_does_not_hide_the_ones_after_it(prepared: Loaded, texts: list[Row]) -> None:
    import torch

    calls: list[int] = []

    def spoil(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            output["loss"] = output["loss"] * torch.nan
        return output

    prepared.torch_model.register_forward_hook(spoil, with_kwargs=True)
    # The gradients of that step are not finite either; clipping to 0 leaves the weights of a dead rate alone.
    wanted = TrainingConfig(max_steps=4, warmup_steps=0, batch_size=8, gradient_accumulation_steps=1)
    wanted.learning_rate = 1e-60
    run = prepared.train(texts, wanted)
    assert [step.loss == step.loss for step in run.of("step")][:2] == [True, False]
