"""How wide padded rows are: in few widths, as every one is recorded, and so that little of a whole step is padding."""

from collections.abc import Sequence
from math import inf

import numpy as np

# Unsloth records launches for eight shapes at most, and each takes seconds.
MOST_WIDTHS = 6
# Of the tokens of a step, padding counted: what a further width has to save.
WORTH_A_WIDTH = 0.01
MULTIPLE = 64
# Widths to choose from.
CANDIDATES = 32


def padded_widths(lengths: Sequence[int], sequences: int) -> list[int]:
    """The widths with the least padding in optimizer steps that are one pass each, as wide as their longest row needs.

    Args:
        lengths: Tokens of every row; at least one.
        sequences: Rows of an optimizer step.

    Returns:
        Columns, narrow ones first. The last one holds the longest row.
    """
    ordered = np.sort(np.asarray(lengths))
    step = _rounded_up(-(-int(ordered[-1]) // CANDIDATES), MULTIPLE)
    candidates = range(step, _rounded_up(int(ordered[-1]), step) + 1, step)
    # A step is no wider than that when all its rows are not.
    shares = [(np.searchsorted(ordered, width, side="right") / len(ordered)) ** sequences for width in candidates]
    return _least_padded(list(candidates), [float(share) for share in shares])


def _least_padded(candidates: list[int], shares: list[float]) -> list[int]:
    """Of the candidates at most so many as may be, the last one among them, with the least mean width of a step.

    Args:
        candidates: Columns, narrow ones first.
        shares: Of the steps that are no wider than each of them; the last one is 1.
    """
    # For each candidate as the widest one: what steps that are no wider add to the mean, and the widths for it.
    best = [(width * share, [width]) for width, share in zip(candidates, shares, strict=True)]
    chosen = best[-1]
    for _ in range(MOST_WIDTHS - 1):
        best = [_with_one_below(best, shares, position, width) for position, width in enumerate(candidates)]
        more = len(best[-1][1]) - len(chosen[1])
        if best[-1][0] < chosen[0] * (1 - WORTH_A_WIDTH * more):
            chosen = best[-1]
    return chosen[1]


def _with_one_below(
    best: list[tuple[float, list[int]]], shares: list[float], position: int, width: int
) -> tuple[float, list[int]]:
    """The best widths below a candidate, and that one; infinitely bad where there are none."""
    if not position:
        return inf, [width]
    means = [best[below][0] + width * (shares[position] - shares[below]) for below in range(position)]
    below = means.index(min(means))
    return means[below], [*best[below][1], width]


def _rounded_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
