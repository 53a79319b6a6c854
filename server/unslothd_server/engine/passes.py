"""How an optimizer step is split over forward passes, and its repair at the same step when memory runs out.

A loss is a sum over tokens divided by the tokens of the whole optimizer step, so a pass may be cut into parts whose
gradients add up to the same; only rounding, and which dropout mask falls on which token, differ.
"""

import gc
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from unslothd.v1.error_reason_pb2 import ErrorReason
from unslothd.v1.training_pb2 import TrainingConfig
from unslothd_server.engine.oom import exhausted
from unslothd_server.errors import ExhaustedError

Inputs = dict[str, Any]


@dataclass
class PassSplit:
    """What was chosen for speed or changed to fit in memory; kept in checkpoints, so that a resume goes on with it.

    Args:
        parts: Parts that each pass is cut into for lack of memory: 1, 2, 4, …
        checkpointing: Activation checkpointing was switched on.
        tokens: Most tokens of a pass, as tuned and before it is cut into parts; 0 = passes as configured.
        joined: Tuned passes join their sequences without padding.
    """

    parts: int = 1
    checkpointing: bool = False
    tokens: int = 0
    joined: bool = False

    @property
    def has_few_shapes(self) -> bool:
        """True where passes are padded to a few widths."""
        return bool(self.tokens) and not self.joined


@dataclass
class StepPasses:
    """Runs the passes of optimizer steps.

    Args:
        batch_size: Sequences that one call of `run` gets at most.
        uses_checkpointing: Tells whether activations are recomputed.
        use_checkpointing: Switches that on.
        zero_gradients: Forgets the gradients of the step under way.
        repaired: Called with each decision and the error behind it, after it was taken.
        cut: Cuts the inputs of `run` into those of its passes.
        split: What is in force.
    """

    batch_size: int
    uses_checkpointing: Callable[[], bool]
    use_checkpointing: Callable[[], None]
    zero_gradients: Callable[[], None]
    repaired: Callable[[PassSplit, ExhaustedError], None]
    cut: Callable[[Inputs, PassSplit], Iterable[Inputs]] = lambda inputs, split: parts_of(inputs, split.parts)
    split: PassSplit = field(default_factory=PassSplit)
    _done: list[Inputs] = field(default_factory=list)

    def begin_step(self) -> None:
        """A new optimizer step: no pass of it was run."""
        self._done.clear()

    def run(self, inputs: Inputs, one_pass: Callable[[Inputs], Any]) -> Any:
        """Runs a pass, in parts if it has to be; returns its loss, as `one_pass` gives it.

        Where memory runs out, the passes of this optimizer step are run again with the new split: some of the
        gradients of the failed one may have been added already.

        Args:
            inputs: Of one pass as configured.
            one_pass: Forward and backward; returns the loss as a tensor without gradients.

        Raises:
            ExhaustedError: Not even one sequence a pass with checkpointing fits (OUT_OF_MEMORY).
        """
        while True:
            try:
                loss = self._in_parts(inputs, one_pass)
            except Exception as error:  # noqa: BLE001 - what is no lack of memory is raised again
                self._repair(error)
                self._run_again(one_pass)
            else:
                self._done.append(inputs)
                return loss

    def _in_parts(self, inputs: Inputs, one_pass: Callable[[Inputs], Any]) -> Any:
        losses = [one_pass(part) for part in self.cut(inputs, self.split)]
        return sum(losses[1:], start=losses[0])

    def _run_again(self, one_pass: Callable[[Inputs], Any]) -> None:
        """Their losses have been counted; only their gradients are missing."""
        position = 0
        while position < len(self._done):
            try:
                self._in_parts(self._done[position], one_pass)
                position += 1
            except Exception as error:  # noqa: BLE001 - the same
                self._repair(error)
                position = 0

    def _repair(self, error: Exception) -> None:
        """Takes the next rung of the ladder; raises where there is none, and for every other error."""
        known = exhausted(error, "load the model with a shorter max_seq_length, or train on shorter rows")
        if known is None or known.reason != ErrorReason.ERROR_REASON_OUT_OF_MEMORY:
            raise error
        if self.split.parts < self.batch_size:
            self.split.parts *= 2
        elif not self.uses_checkpointing():
            self.use_checkpointing()
            self.split.checkpointing = True
        else:
            raise known from error
        # The traceback's frames hold the tensors that did not fit.
        traceback.clear_frames(error.__traceback__)
        self.zero_gradients()
        _give_back()
        self.repaired(self.split, known)


def split_config(configured: TrainingConfig, split: PassSplit, passes: int | None = None) -> TrainingConfig:
    """The config as it is: smaller passes than the trainer's, more of them, the same optimizer step.

    Args:
        configured: As the trainer has it.
        split: What is in force.
        passes: That one of the trainer's is cut into where all rows are as long as the longest; by default the
            parts of the split.
    """
    config = TrainingConfig()
    config.CopyFrom(configured)
    parts = min(split.parts if passes is None else passes, configured.batch_size)
    config.batch_size = -(-configured.batch_size // parts)
    config.gradient_accumulation_steps = configured.gradient_accumulation_steps * parts
    config.use_gradient_checkpointing = configured.use_gradient_checkpointing or split.checkpointing
    return config


def parts_of(inputs: Inputs, parts: int) -> Iterator[Inputs]:
    """Cuts the inputs of a pass into at most so many parts of whole sequences, in their order.

    Args:
        inputs: Padded rows (input_ids [sequences, tokens]), or sequences joined without padding (input_ids [1, tokens]
            and packed_seq_lengths [sequences]).
        parts: At least 1.
    """
    if parts == 1:
        yield inputs
    elif inputs.get("packed_seq_lengths") is not None:
        yield from _joined_parts(inputs, parts)
    else:
        yield from _padded_parts(inputs, parts)


def _padded_parts(inputs: Inputs, parts: int) -> Iterator[Inputs]:
    sequences, width = inputs["input_ids"].shape
    for start, end in _ranges(sequences, parts):
        part = {
            name: value[start:end] if getattr(value, "ndim", 0) and value.shape[0] == sequences else value
            for name, value in inputs.items()
        }
        used = _used_width(part, width)
        yield {
            name: value[:, :used] if getattr(value, "ndim", 0) == 2 and value.shape[1] == width else value  # noqa: PLR2004
            for name, value in part.items()
        }


def _used_width(part: Inputs, width: int) -> int:
    """Columns up to the last one that is no padding in every row."""
    mask = part.get("attention_mask")
    return width if mask is None else int(mask.any(dim=0).nonzero().max()) + 1


def _joined_parts(inputs: Inputs, parts: int) -> Iterator[Inputs]:
    lengths = inputs["packed_seq_lengths"]
    tokens = inputs["input_ids"].shape[1]
    ends = lengths.cumsum(0).tolist()
    for first, last in _ranges(len(ends), parts):
        start, end = (ends[first - 1] if first else 0), ends[last - 1]
        part = {
            name: value[:, start:end] if getattr(value, "ndim", 0) == 2 and value.shape[1] == tokens else value  # noqa: PLR2004
            for name, value in inputs.items()
        }
        part["packed_seq_lengths"] = lengths[first:last]
        yield part


def _ranges(count: int, parts: int) -> Iterator[tuple[int, int]]:
    """Cuts 0 to count into at most so many ranges, none empty, that differ by one at most."""
    parts = min(parts, count)
    edges = [count * index // parts for index in range(parts + 1)]
    yield from pairwise(edges)


def _give_back() -> None:
    import torch

    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
