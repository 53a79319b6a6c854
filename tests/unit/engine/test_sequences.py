"""Sequences taken out of a pass's inputs and put together again: nothing is lost, added or reordered."""

from itertools import chain
from typing import Any

import pytest
import torch

from unslothd_server.engine.sequences import can_be_taken_apart, joined_inputs, padded_inputs, sequences_of
from unslothd_server.engine.tokens import IGNORED_LABEL

ROWS = [[5, 6, 7], [8], [9, 10]]
PAD = 1


def rows_in(inputs: dict[str, Any]) -> list[tuple[list[int], list[int]]]:
    return [(each.ids.tolist(), each.labels.tolist()) for each in sequences_of(inputs)]


def joined() -> dict[str, Any]:
    ids = torch.tensor([list(chain.from_iterable(ROWS))])
    lengths = torch.tensor([len(row) for row in ROWS], dtype=torch.int32)
    return {"input_ids": ids, "labels": ids * 10, "position_ids": ids * 0, "packed_seq_lengths": lengths}


def test_joined_rows_come_apart_at_their_edges():
    assert rows_in(joined()) == [(row, [token * 10 for token in row]) for row in ROWS]


def test_padded_rows_lose_their_padding_on_either_side():
    inputs = padded_inputs(sequences_of(joined()), width=4, pad_token_id=PAD)
    assert inputs["input_ids"].tolist() == [[5, 6, 7, PAD], [8, PAD, PAD, PAD], [9, 10, PAD, PAD]]
    assert inputs["labels"][1].tolist() == [80, IGNORED_LABEL, IGNORED_LABEL, IGNORED_LABEL]
    assert inputs["attention_mask"].sum(1).tolist() == [3, 1, 2]
    flipped = {name: value.flip(0, 1) for name, value in inputs.items()}
    assert rows_in(inputs) == rows_in(joined())
    assert [ids for ids, _ in rows_in(flipped)] == [row[::-1] for row in reversed(ROWS)]


def test_padding_that_looks_like_a_token_is_told_by_the_mask():
    inputs = padded_inputs(sequences_of(joined()), width=3, pad_token_id=9)
    assert rows_in(inputs) == rows_in(joined())


def test_rows_beyond_the_sequences_are_padding_and_nothing_of_them_is_learnt():
    inputs = padded_inputs(sequences_of(joined()), width=4, pad_token_id=PAD, rows=5)
    assert inputs["input_ids"].shape == (5, 4)
    assert inputs["input_ids"][3:].tolist() == [[PAD] * 4] * 2
    assert inputs["labels"][3:].tolist() == [[IGNORED_LABEL] * 4] * 2
    assert inputs["attention_mask"][3:].tolist() == [[1, 0, 0, 0]] * 2


def test_joined_rows_begin_anew_and_do_not_predict_each_other():
    inputs = joined_inputs(sequences_of(joined()))
    assert inputs["input_ids"].tolist() == [[5, 6, 7, 8, 9, 10]]
    assert inputs["position_ids"].tolist() == [[0, 1, 2, 0, 0, 1]]
    assert inputs["packed_seq_lengths"].tolist() == [3, 1, 2]
    assert inputs["labels"].tolist() == [[IGNORED_LABEL, 60, 70, IGNORED_LABEL, IGNORED_LABEL, 100]]


@pytest.mark.parametrize("change", [{"pixel_values": 0}, {"attention_mask": None}])
def test_inputs_with_more_or_less_are_not_touched(change: dict[str, Any]):
    inputs = joined()
    assert can_be_taken_apart(inputs)
    assert not can_be_taken_apart({**inputs, **change})
