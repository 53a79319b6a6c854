"""Widths of padded rows: few, every row fits into one, and as little as possible of a whole step is padding."""

import random
from statistics import fmean

from hypothesis import given
from hypothesis import strategies as st

from unslothd_server.engine.widths import MOST_WIDTHS, padded_widths

SEQUENCES = 8


def mean_width(lengths: list[int], widths: list[int]) -> float:
    """Of steps of rows that are drawn at random."""
    drawn = random.Random(0)
    steps = [drawn.sample(lengths, SEQUENCES) for _ in range(2000)]
    return fmean(next(width for width in widths if width >= max(step)) for step in steps)


def mixed() -> list[int]:
    drawn = random.Random(1)
    return [min(1879, max(20, int(drawn.lognormvariate(5.4, 0.75)))) for _ in range(1000)]


def test_they_pad_less_than_widths_in_even_steps():
    lengths = mixed()
    even = [320 * number for number in range(1, MOST_WIDTHS + 1)]
    assert len(padded_widths(lengths, SEQUENCES)) == MOST_WIDTHS
    assert mean_width(lengths, padded_widths(lengths, SEQUENCES)) < 0.97 * mean_width(lengths, even)


def test_rows_of_one_length_have_one_width():
    assert padded_widths([2048] * 50, SEQUENCES) == [2048]


def test_no_width_is_spent_on_steps_that_hardly_come():
    # Nearly every step has one of the long rows.
    assert padded_widths([100] * 10 + [2048] * 90, SEQUENCES) == [2048]
    # One in six has none.
    assert padded_widths([100] * 80 + [2048] * 20, SEQUENCES) == [128, 2048]


def test_long_rows_have_coarser_widths():
    widths = padded_widths([1000, 20_000, 32_000] * 10, SEQUENCES)
    assert widths[-1] == 32_768
    assert all(width % 1024 == 0 for width in widths)


@given(lengths=st.lists(st.integers(1, 40_000), min_size=1, max_size=60), sequences=st.integers(1, 64))
def test_every_row_fits_into_one_of_a_few_widths(lengths: list[int], sequences: int):
    widths = padded_widths(lengths, sequences)
    assert 1 <= len(widths) <= MOST_WIDTHS
    assert widths == sorted(set(widths))
    assert all(width % 64 == 0 for width in widths)
    assert max(lengths) <= widths[-1] < max(lengths) + max(64, max(lengths) / 8)
