"""Which passes an optimizer step is split into: costs as straight lines over tokens, and the cheapest split that fits.

A pass costs what its launches cost and what its tokens cost. So few large passes are fast, padding is dear only where
the device and not the host is the limit, and recomputing activations pays only where memory forces small passes. Where
sequences are joined, attention is launched in every layer once for each length among them.
"""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import inf
from statistics import fmean

import numpy as np

from unslothd_server.engine.widths import padded_widths

SAMPLED_STEPS = 32
# Not worth more memory: a split that is faster by less.
WORTH_MEMORY = 0.02
# Shapes that are recorded share memory: all together take so much of what the widest one takes alone. On an H200, 1B
# with six widths, it was 1.05 with rows of up to 1024 tokens and 1.09 with up to 2048.
SHARED_WHEN_RECORDED = 1.1
# Unsloth records CUDA graphs of a layer for so many shapes, and for none once there are more.
MAX_SHAPES = 8


@dataclass(frozen=True)
class Split:
    """How the sequences of an optimizer step are split over passes.

    Args:
        tokens: Most tokens of a pass, padding counted; a longer sequence has a pass of its own.
        joined: Sequences are joined without padding, else padded.
        checkpointing: Activations are recomputed in the backward pass.
    """

    tokens: int
    joined: bool
    checkpointing: bool


@dataclass(frozen=True)
class PassCost:
    """What passes of one kind cost, as lines over their tokens, padding counted.

    Args:
        joined: As in Split.
        checkpointing: As in Split.
        seconds: Of a pass, whatever its size.
        seconds_per_token: What each token adds.
        num_bytes: Memory beyond what is held between passes, whatever its size.
        bytes_per_token: What each token adds.
        most_tokens: Of the largest pass that was run; nothing is known of larger ones.
        recorded: Launches are recorded (CUDA graphs), and every shape that was run keeps memory.
        seconds_per_length: What each further length among joined sequences adds.
    """

    joined: bool
    checkpointing: bool
    seconds: float
    seconds_per_token: float
    num_bytes: float
    bytes_per_token: float
    most_tokens: int
    recorded: bool = False
    seconds_per_length: float = 0.0

    def time(self, tokens: int, lengths: int = 1) -> float:
        """Seconds of a pass.

        Args:
            tokens: Of the pass, padding counted.
            lengths: That its sequences have.
        """
        return self.seconds + self.seconds_per_token * tokens + self.seconds_per_length * (lengths - 1)

    def memory(self, tokens: int) -> float:
        """Bytes of a pass at its peak."""
        return self.num_bytes + self.bytes_per_token * tokens

    def memory_of(self, split: Split, sizes: "StepSizes") -> float:
        """Bytes at the peak of a training that is split so; infinite where more shapes may come than are recorded."""
        if not self.recorded:
            return self.memory(split.tokens)
        # Smaller passes come in any number of rows.
        whole = split.tokens >= sizes.budget(sizes.sequences, joined=False)
        return self.memory_recorded(sizes) if whole else inf

    def memory_recorded(self, sizes: "StepSizes") -> float:
        """Bytes at the peak where passes of whole steps are recorded in every width."""
        if self.checkpointing:
            # What these share was not measured, so nothing is taken off.
            return self.memory(sizes.sequences * sum(sizes.widths))
        return SHARED_WHEN_RECORDED * self.memory(sizes.budget(sizes.sequences, joined=False))

    @classmethod
    def through(
        cls,
        joined: bool,
        checkpointing: bool,
        small: tuple[int, float, float],
        large: tuple[int, float, float],
        *,
        recorded: bool = False,
    ) -> "PassCost":
        """The lines through two measured passes.

        Args:
            joined: As in Split.
            checkpointing: As in Split.
            small: Tokens, seconds, bytes.
            large: The same of a pass of more tokens; or of the same one, where there is no larger one.
            recorded: As in PassCost.
        """
        seconds = _line((small[0], small[1]), (large[0], large[1]))
        memory = _line((small[0], small[2]), (large[0], large[2]))
        return cls(joined, checkpointing, *seconds, *memory, most_tokens=large[0], recorded=recorded)

    def with_lengths(self, tokens: int, lengths: int, seconds: float) -> "PassCost":
        """The same lines, and what further lengths add, by a pass that has some.

        Args:
            tokens: Of that pass.
            lengths: That its sequences have, at least two.
            seconds: That it took.
        """
        return replace(self, seconds_per_length=max(seconds - self.time(tokens), 0.0) / (lengths - 1))


def _line(small: tuple[int, float], large: tuple[int, float]) -> tuple[float, float]:
    """Offset and slope, neither below 0."""
    tokens = large[0] - small[0]
    slope = max(large[1] - small[1], 0.0) / tokens if tokens else large[1] / large[0]
    return max(large[1] - slope * large[0], 0.0), slope


@dataclass(frozen=True)
class Choice:
    """A split and what it is expected to cost.

    Args:
        split: What to do.
        seconds: Of a typical optimizer step, all passes.
        num_bytes: Memory of its largest pass, beyond what is held between passes.
        saved_in_one: Part of `seconds` that one pass of the whole step would save: what its other passes cost at least.
        tokens: Of a typical optimizer step, padding not counted.
    """

    split: Split
    seconds: float
    num_bytes: float
    saved_in_one: float
    tokens: float


@dataclass(frozen=True)
class Tuning:
    """What was found for a training.

    Args:
        choice: The split and what it is expected to cost.
        costs: Of every kind of pass that was measured.
        held_bytes: Memory between passes, optimizer states included.
        remembered: Nothing was measured: an earlier training did.
        probe_seconds: Spent on measuring.
    """

    choice: Choice
    costs: Sequence[PassCost]
    held_bytes: int
    remembered: bool
    probe_seconds: float


@dataclass(frozen=True)
class StepSizes:
    """How long the rows of optimizer steps are.

    Args:
        lengths: Tokens of every row.
        sequences: Of an optimizer step.
    """

    lengths: Sequence[int]
    sequences: int

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return max(self.lengths)

    @cached_property
    def widths(self) -> list[int]:
        """Columns that padded passes may have, narrow ones first."""
        return padded_widths(self.lengths, self.sequences)

    def budget(self, rows: int, *, joined: bool) -> int:
        """Tokens of a pass of so many of the longest rows."""
        return rows * (self.longest if joined else self.width(self.longest))

    def width(self, length: int) -> int:
        """Columns of a padded pass whose longest row has so many tokens."""
        return self.widths[bisect_left(self.widths, length)]

    def passes(self, tokens: int, *, joined: bool) -> int:
        """Passes of a step of the longest rows.

        Args:
            tokens: Most tokens of a pass.
            joined: As in Split.
        """
        rows = max(tokens // self.budget(1, joined=joined), 1)
        return -(-self.sequences // rows)

    def row_counts(self) -> list[int]:
        """The whole step, half of it, a quarter …, one row."""
        counts = [self.sequences]
        while counts[-1] > 1:
            counts.append(-(-counts[-1] // 2))
        return counts

    def typical_pass(self, tokens: int) -> list[int]:
        """Lengths of the sequences that a typical joined pass has; of those of a step, the pass with most lengths.

        Args:
            tokens: Most that a pass may have.
        """
        steps = sorted(self.sample(), key=sum)
        cut = _cut(steps[len(steps) // 2], Split(tokens, joined=True, checkpointing=False), self)
        return max(cut, key=lambda group: len(set(group)))

    def sample(self) -> list[list[int]]:
        """Lengths of typical steps; the same for the same rows."""
        if len(self.lengths) <= self.sequences:
            return [list(self.lengths)]
        drawn = np.random.default_rng(0)
        return [drawn.choice(self.lengths, self.sequences, replace=False).tolist() for _ in range(SAMPLED_STEPS)]


def passes(lengths: Sequence[int], split: Split, sizes: StepSizes) -> Iterator[list[int]]:
    """Positions of the sequences of each pass of a step: long ones together, passes as full as they may be.

    Args:
        lengths: Of the sequences of this step.
        split: How to split.
        sizes: Of the training; gives the widths of padded rows.
    """
    longest_first = sorted(range(len(lengths)), key=lambda position: (-lengths[position], position))
    start = 0
    while start < len(longest_first):
        end = start + _fitting([lengths[position] for position in longest_first[start:]], split, sizes)
        yield longest_first[start:end]
        start = end


def _fitting(lengths: Sequence[int], split: Split, sizes: StepSizes) -> int:
    """Sequences, longest first, that go into one pass; at least one."""
    if not split.joined:
        # Powers of two keep the shapes few.
        rows = max(split.tokens // sizes.width(lengths[0]), 1)
        return min(len(lengths), 1 << (rows.bit_length() - 1) if rows < len(lengths) else rows)
    tokens = count = 0
    for length in lengths:
        tokens += length
        if count and tokens > split.tokens:
            break
        count += 1
    return count


def tokens_of(lengths: Sequence[int], split: Split, sizes: StepSizes) -> int:
    """Tokens of one pass of these sequences, padding counted."""
    return sum(lengths) if split.joined else len(lengths) * sizes.width(max(lengths))


def choose(costs: Sequence[PassCost], sizes: StepSizes, room: float) -> Choice | None:
    """The fastest split that fits; of nearly equal ones that with the least memory. None when nothing fits.

    Args:
        costs: Of every kind of pass that may be chosen.
        sizes: Of the training.
        room: Bytes for a pass at its peak.
    """
    fitting = [choice for choice in _choices(costs, sizes) if choice.num_bytes <= room]
    if not fitting:
        return None
    fastest = min(choice.seconds for choice in fitting)
    return min(
        (choice for choice in fitting if choice.seconds <= fastest * (1 + WORTH_MEMORY)),
        key=lambda choice: (choice.num_bytes, choice.seconds),
    )


def _choices(costs: Sequence[PassCost], sizes: StepSizes) -> Iterator[Choice]:
    steps = sizes.sample()
    for cost in costs:
        for rows in sizes.row_counts():
            split = Split(sizes.budget(rows, joined=cost.joined), cost.joined, cost.checkpointing)
            if split.tokens > cost.most_tokens:
                continue
            cuts = [_cut(lengths, split, sizes) for lengths in steps]
            shapes = {(len(group), sizes.width(group[0])) for cut in cuts for group in cut}
            if not cost.joined and len(shapes) > MAX_SHAPES:
                continue
            yield Choice(
                split,
                seconds=fmean(sum(_time(group, cost, split, sizes) for group in cut) for cut in cuts),
                num_bytes=cost.memory_of(split, sizes),
                saved_in_one=fmean((len(cut) - 1) * cost.seconds for cut in cuts),
                tokens=fmean(map(sum, steps)),
            )


def _time(group: Sequence[int], cost: PassCost, split: Split, sizes: StepSizes) -> float:
    return cost.time(tokens_of(group, split, sizes), len(set(group)))


def _cut(lengths: Sequence[int], split: Split, sizes: StepSizes) -> list[list[int]]:
    return [[lengths[position] for position in group] for group in passes(lengths, split, sizes)]
