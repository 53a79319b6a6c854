"""The choice of passes: the fastest split by what was measured, among those that fit."""

from dataclasses import replace
from itertools import chain

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unslothd_server.engine.micro_batching import (
    SHARED_WHEN_RECORDED,
    Choice,
    PassCost,
    Split,
    StepSizes,
    choose,
    passes,
    tokens_of,
)
from unslothd_server.engine.widths import MOST_WIDTHS

GIB = 1024**3
FULL = StepSizes([2048] * 100, sequences=8)
MIXED = StepSizes([100, 150, 200, 250, 300, 400, 700, 1500] * 20, sequences=8)


def cost(
    *, seconds: float = 0.0, per_token: float = 1e-5, gib_per_row: float = 2.0, most_tokens: int = 10**6, **kind: bool
) -> PassCost:
    joined, checkpointing = kind.get("joined", True), kind.get("checkpointing", False)
    return PassCost(joined, checkpointing, seconds, per_token, 0.0, gib_per_row * GIB / 2048, most_tokens)


def chosen(costs: list[PassCost], sizes: StepSizes, gib: float) -> Choice:
    choice = choose(costs, sizes, int(gib * GIB))
    assert choice is not None
    return choice


def test_where_launches_cost_the_whole_step_is_one_pass():
    choice = chosen([cost(seconds=0.2)], FULL, 80)
    assert choice.split == Split(8 * 2048, joined=True, checkpointing=False)
    assert choice.seconds == pytest.approx(0.2 + 8 * 2048 * 1e-5)
    assert choice.num_bytes == 16 * GIB


def test_where_passes_are_as_fast_small_the_least_memory_is_taken():
    assert chosen([cost()], FULL, 80).split.tokens == 2048


def test_passes_shrink_to_what_fits():
    assert chosen([cost(seconds=0.2)], FULL, 9).split.tokens == 4 * 2048


def test_activations_are_recomputed_only_where_that_makes_few_passes_of_many():
    kept = cost(seconds=0.2, per_token=1e-5, gib_per_row=8)
    recomputed = cost(seconds=0.3, per_token=1.4e-5, gib_per_row=0.5, checkpointing=True)
    assert chosen([kept, recomputed], FULL, 80).split.checkpointing is False
    assert chosen([kept, recomputed], FULL, 9).split.checkpointing is True
    assert chosen([kept, recomputed], FULL, 1).split.checkpointing is True


def test_nothing_is_chosen_where_not_one_row_fits():
    assert choose([cost()], FULL, GIB) is None
    assert choose([], FULL, 80 * GIB) is None


def test_padding_is_chosen_where_it_saves_launches_and_not_where_it_costs_tokens():
    joined, padded = cost(seconds=0.2, per_token=1e-6), cost(seconds=0.05, per_token=1e-6, joined=False)
    assert chosen([joined, padded], MIXED, 80).split.joined is False
    dear = cost(seconds=0.05, per_token=1e-4, joined=False)
    assert chosen([cost(seconds=0.2, per_token=1e-4), dear], MIXED, 80).split.joined is True


def test_no_pass_is_larger_than_what_was_tried():
    assert chosen([cost(seconds=0.2, most_tokens=5000)], FULL, 80).split.tokens == 2 * 2048


def test_lines_go_through_what_was_measured():
    line = PassCost.through(True, False, small=(1000, 0.2, 2e9), large=(5000, 0.4, 6e9))
    assert (line.time(1000), line.time(5000)) == (pytest.approx(0.2), pytest.approx(0.4))
    assert (line.memory(1000), line.memory(5000)) == (pytest.approx(2e9), pytest.approx(6e9))
    noisy = PassCost.through(True, False, small=(1000, 0.5, 2e9), large=(5000, 0.4, 1e9))
    assert (noisy.time(9000), noisy.memory(9000)) == (0.4, 1e9)
    alone = PassCost.through(True, False, small=(1000, 0.2, 2e9), large=(1000, 0.2, 2e9))
    assert (alone.time(2000), alone.memory(2000)) == (pytest.approx(0.4), pytest.approx(4e9))


def test_what_further_lengths_add_is_what_a_pass_takes_beyond_the_lines():
    line = PassCost.through(True, False, small=(1000, 0.2, 2e9), large=(5000, 0.4, 6e9))
    mixed = line.with_lengths(1000, lengths=5, seconds=0.3)
    assert mixed.time(1000) == pytest.approx(0.2)
    assert mixed.time(1000, lengths=5) == pytest.approx(0.3)
    assert mixed.time(5000, lengths=3) == pytest.approx(0.45)
    assert line.with_lengths(1000, lengths=5, seconds=0.1).seconds_per_length == 0


def test_joined_passes_are_as_slow_as_their_lengths_make_them():
    joined, padded = cost(seconds=0.1, per_token=1e-6), cost(seconds=0.15, per_token=1e-6, joined=False)
    assert chosen([joined, padded], MIXED, 80).split.joined is True
    launches = replace(joined, seconds_per_length=0.03)
    assert chosen([launches, padded], MIXED, 80).split.joined is False
    assert chosen([launches], MIXED, 80).seconds > 0.1 + 0.03 * 3


def test_rows_of_one_length_add_nothing_for_lengths():
    assert chosen([replace(cost(seconds=0.2), seconds_per_length=9)], FULL, 80).seconds == pytest.approx(0.2 + 0.16384)


def test_a_typical_pass_has_the_lengths_of_rows_and_no_more_tokens_than_it_may():
    whole = MIXED.typical_pass(10**6)
    assert len(whole) == 8
    assert set(whole) <= set(MIXED.lengths)
    part = MIXED.typical_pass(1500)
    assert sum(part) <= 1500
    assert len(set(part)) > 1
    assert FULL.typical_pass(3 * 2048) == [2048] * 3


def test_one_pass_of_a_step_saves_what_the_others_cost():
    assert chosen([cost(seconds=0.2)], FULL, 80).saved_in_one == 0
    assert chosen([cost(seconds=0.2)], FULL, 5).saved_in_one == pytest.approx(3 * 0.2)


def test_padded_passes_have_few_shapes():
    split = Split(MIXED.budget(8, joined=False), joined=False, checkpointing=False)
    shapes = {
        (len(group), MIXED.width(lengths[group[0]]))
        for lengths in MIXED.sample()
        for group in passes(lengths, split, MIXED)
    }
    assert len(shapes) <= MOST_WIDTHS


def recorded(**options: float) -> PassCost:
    return replace(cost(joined=False, **options), recorded=True)


def test_recorded_passes_share_the_memory_of_the_widest():
    choice = chosen([recorded(seconds=0.05)], MIXED, 80)
    widest = MIXED.widths[-1]
    assert choice.split == Split(8 * widest, joined=False, checkpointing=False)
    assert choice.num_bytes == pytest.approx(SHARED_WHEN_RECORDED * 8 * widest / 2048 * 2 * GIB)


def test_all_that_recomputing_passes_record_is_counted():
    recomputing = replace(recorded(seconds=0.05), checkpointing=True)
    assert chosen([recomputing], MIXED, 80).num_bytes == pytest.approx(8 * sum(MIXED.widths) / 2048 * 2 * GIB)


def test_recorded_passes_are_not_chosen_where_their_shapes_do_not_fit():
    joined, memory = cost(seconds=0.5), recorded().memory_recorded(MIXED) / GIB
    assert chosen([joined, recorded(seconds=0.05)], MIXED, 1.01 * memory).split.joined is False
    assert chosen([joined, recorded(seconds=0.05)], MIXED, 0.99 * memory).split.joined is True


def test_recorded_passes_are_of_whole_steps_as_smaller_ones_come_in_too_many_shapes():
    fast_when_small = recorded(seconds=0.0, per_token=1e-3)
    assert chosen([fast_when_small], MIXED, 80).split.tokens == MIXED.budget(8, joined=False)


LENGTHS = st.lists(st.integers(1, 2048), min_size=1, max_size=40)


@given(lengths=LENGTHS, tokens=st.integers(1, 20_000), joined=st.booleans())
def test_every_sequence_is_in_one_pass_and_no_pass_is_too_large(lengths: list[int], tokens: int, joined: bool):
    sizes = StepSizes(lengths, sequences=len(lengths))
    split = Split(tokens, joined, checkpointing=False)
    groups = list(passes(lengths, split, sizes))
    assert sorted(chain.from_iterable(groups)) == list(range(len(lengths)))
    for group in groups:
        used = tokens_of([lengths[position] for position in group], split, sizes)
        assert used <= tokens or len(group) == 1


@given(lengths=LENGTHS, sequences=st.integers(1, 64), gib=st.integers(1, 80), launch=st.floats(0, 1))
def test_the_choice_fits_and_no_fitting_one_is_much_faster(lengths: list[int], sequences: int, gib: int, launch: float):
    sizes = StepSizes(lengths, sequences)
    costs = [cost(seconds=launch, joined=joined) for joined in (True, False)]
    choice = choose(costs, sizes, gib * GIB)
    assert choice is None or choice.num_bytes <= gib * GIB
    for each in costs:
        alone = choose([each], sizes, gib * GIB)
        if alone is not None:
            assert choice is not None
            assert choice.seconds <= alone.seconds * 1.021
