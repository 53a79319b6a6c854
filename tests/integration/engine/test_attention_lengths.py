"""Unsloth fills up the lengths that attention sees, so that cuDNN meets few of them; of one length there are few."""

import sys
from importlib import import_module
from typing import Any

import pytest

from support.engine_runs import Loaded, Row
from unslothd.v1.training_pb2 import MICRO_BATCHING_FIXED, MICRO_BATCHING_TUNED, TrainingConfig
from unslothd_server.engine.attention_lengths import KEPT_AS, MODULE, SETTING

LONG = "The quick fox jumps over the lazy dog. " * 60
# Every one is cut at the length of the model.
OF_ONE_LENGTH: list[Row] = [{"text": f"{number} is a number. {LONG}"} for number in range(8)]
OF_TWO_LENGTHS: list[Row] = [*OF_ONE_LENGTH[:-1], {"text": "Short."}]


def filled_up_to(
    loaded: Loaded, rows: list[Row], *, packing: bool = False, tuned: bool = False, **options: Any
) -> set[int]:
    """Multiples of what lengths were filled up to in the passes of a training; 0 = they stayed as they were."""
    # On a CPU the attention of the model is that of Transformers, and nobody needs it.
    import_module("unsloth.models.llama")
    attention = sys.modules[MODULE]
    seen: set[int] = set()
    hook = loaded.torch_model.register_forward_pre_hook(lambda *_: seen.add(getattr(attention, KEPT_AS)))
    before = getattr(attention, KEPT_AS)
    config = TrainingConfig(max_steps=2, warmup_steps=0, gradient_accumulation_steps=1, packing=packing)
    config.micro_batching = MICRO_BATCHING_TUNED if tuned else MICRO_BATCHING_FIXED
    try:
        loaded.train(rows, config, **options)
    finally:
        hook.remove()
    assert getattr(attention, KEPT_AS) == before
    return seen


def test_rows_of_one_length_stay_as_long_as_they_are(prepared: Loaded):
    assert filled_up_to(prepared, OF_ONE_LENGTH) == {0}


def test_rows_of_several_lengths_are_filled_up(prepared: Loaded):
    assert 0 not in filled_up_to(prepared, OF_TWO_LENGTHS)


def test_rows_to_evaluate_on_count_too(prepared: Loaded):
    assert 0 not in filled_up_to(prepared, OF_ONE_LENGTH, eval_rows=[{"text": "Short."}])


def test_packed_rows_hold_sequences_of_several_lengths(prepared: Loaded):
    assert 0 not in filled_up_to(prepared, OF_ONE_LENGTH, packing=True)


def test_passes_that_are_padded_to_a_few_widths_stay_as_they_are_and_evaluations_do_not(prepared: Loaded):
    assert filled_up_to(prepared, OF_TWO_LENGTHS, tuned=True) == {0}
    both = filled_up_to(prepared, OF_TWO_LENGTHS, tuned=True, eval_rows=OF_TWO_LENGTHS)
    assert 0 in both
    assert len(both) == 2


def test_what_an_operator_set_holds(prepared: Loaded, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(SETTING, "64")
    assert 0 not in filled_up_to(prepared, OF_ONE_LENGTH)
