"""Finds how to split optimizer steps by a few real passes before the first step, and puts that into force."""

import gc
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from unslothd_server.engine import pass_costs, reports
from unslothd_server.engine.devices import on_gpu
from unslothd_server.engine.footprint import footprint
from unslothd_server.engine.memory import device_memory_at_most, memory_bytes
from unslothd_server.engine.micro_batching import Choice, PassCost, Split, StepSizes, Tuning, choose, passes
from unslothd_server.engine.model_loading import LoadedModel
from unslothd_server.engine.oom import exhausted
from unslothd_server.engine.passes import Inputs, PassSplit
from unslothd_server.engine.probe import Peak, wait_for_device
from unslothd_server.engine.recorded_passes import forget_recorded, may_have_recorded
from unslothd_server.engine.sequences import Sequence, can_be_taken_apart, joined_inputs, padded_inputs, sequences_of
from unslothd_server.engine.tokens import IGNORED_LABEL
from unslothd_server.engine.trainer import set_checkpointing
from unslothd_server.engine.untouched import random_state_kept

# Not used of what is free: for other processes, fragments, rows that differ.
MARGIN_SHARE = 0.05
MARGIN_BYTES = 512 * 1024 * 1024
TIMED_PASSES = 2
# Padded rows let Unsloth compile each layer and record its launches, which took 50 s on an H100 and can save no more
# than the time of launches; shorter trainings do without.
COMPILE_WORTH_SECONDS = 240.0
# Recomputing activations can only help where what larger passes save of launches is more than this share of a step.
WORTH_CHECKPOINTING = 0.1


def tune(trainer: Any, loaded: LoadedModel, check: Callable[[], None], *, may_probe: bool = True) -> Tuning | None:
    """Chooses a split for a trainer that stands before its first step, and puts it into force.

    Weights, optimizer and random state stay as they are.

    Args:
        trainer: Its passes get whole optimizer steps.
        loaded: Its model.
        check: Called before every pass; raises to stop.
        may_probe: Measure what no earlier training did.

    Returns:
        None where the trainer's passes cannot be split in another way, where not even one row fits, or where nothing
        is known and nothing may be measured. Passes are then run as they are, with checkpointing where nothing fits,
        and repaired where they do not fit.
    """
    begin = time.perf_counter()
    sizes = step_sizes(trainer)
    probe = _Probe(trainer, sizes, check)
    if not probe.possible:
        return None
    # The optimizer makes its states in the first step.
    states = footprint(trainer).states
    probe.free()
    held, free = memory_bytes(), reports.free_memory(trainer.model)
    room = int(free - states - max(MARGIN_BYTES, MARGIN_SHARE * free))
    file = pass_costs.file_of(loaded, sizes, packing=trainer.args.packing)
    costs = pass_costs.read(file, room)
    remembered = _suffice(costs, probe, room)
    if not remembered and may_probe:
        with random_state_kept(), device_memory_at_most(room):
            costs = _measured(probe, room)
        pass_costs.write(file, room, costs)
    choice = choose(costs, sizes, room)
    if probe.has_recorded and (choice is None or choice.split.joined):
        forget_recorded(trainer.model)
    if choice is None:
        # Small passes are the last resort, as launches cost most there.
        set_checkpointing(trainer.model, on=True)
        trainer.passes.split.checkpointing = True
        return None
    put_into_force(trainer, choice.split)
    return Tuning(choice, costs, held + states, remembered, time.perf_counter() - begin)


def put_into_force(trainer: Any, split: Split) -> None:
    """Makes a trainer whose passes get whole optimizer steps split them so."""
    set_checkpointing(trainer.model, on=split.checkpointing)
    in_force = trainer.passes.split
    in_force.tokens, in_force.joined, in_force.checkpointing = split.tokens, split.joined, split.checkpointing
    go_on(trainer)


def go_on(trainer: Any) -> None:
    """Makes a trainer split its optimizer steps as its split says already."""
    sizes, pad_token_id = step_sizes(trainer), _pad_token_id(trainer)
    recorded = may_have_recorded(trainer)

    def cut(inputs: Inputs, split: PassSplit) -> Iterator[Inputs]:
        sequences = sequences_of(inputs)
        chosen = Split(max(split.tokens // split.parts, 1), split.joined, split.checkpointing)
        # The last step of an epoch may have fewer rows, which would be further shapes to record.
        rows = sizes.sequences if recorded and chosen.tokens >= sizes.budget(sizes.sequences, joined=False) else 0
        for positions in passes([len(each) for each in sequences], chosen, sizes):
            group = [sequences[position] for position in positions]
            yield _inputs(group, sizes, pad_token_id, joined=split.joined, rows=rows)

    trainer.passes.cut = cut
    if recorded:
        # What was recorded of passes that do not fit would keep its memory.
        trainer.passes.zero_gradients = partial(forget_recorded, trainer.model)


def longest_passes(trainer: Any) -> int | None:
    """Passes of a tuned optimizer step whose rows are all as long as the longest; None where nothing was tuned."""
    split = trainer.passes.split
    return step_sizes(trainer).passes(split.tokens // split.parts, joined=split.joined) if split.tokens else None


def step_sizes(trainer: Any) -> StepSizes:
    """Lengths of the trainer's rows, packed ones as they are, and the sequences of its optimizer step."""
    lengths = [len(ids) for ids in trainer.train_dataset["input_ids"]]
    return StepSizes(lengths, min(trainer.args.per_device_train_batch_size, len(lengths)))


def _pad_token_id(trainer: Any) -> int:
    tokenizer = trainer.processing_class
    return int(tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id)


def _inputs(sequences: list[Sequence], sizes: StepSizes, pad_token_id: int, *, joined: bool, rows: int = 0) -> Inputs:
    if joined:
        return joined_inputs(sequences)
    return padded_inputs(sequences, sizes.width(max(map(len, sequences))), pad_token_id, rows=rows)


def _measured(probe: "_Probe", room: int) -> list[PassCost]:
    """Costs of the kinds of passes that may be the fastest."""
    costs = _measured_kinds(probe, room)
    if probe.may_pad_instead and _is_long(choose(costs, probe.sizes, room), probe):
        # Of one kind only: what is recorded of another would keep its memory too.
        joined = next((cost for cost in costs if probe.may_record(room, cost)), None)
        recorded = None if joined is None else probe.recorded_cost(joined)
        costs += [] if recorded is None else [recorded]
    return costs


def _is_long(choice: Choice | None, probe: "_Probe") -> bool:
    return choice is not None and choice.seconds * probe.steps > COMPILE_WORTH_SECONDS


def _suffice(costs: list[PassCost], probe: "_Probe", room: int) -> bool:
    """False when this training has to measure what an earlier one did not."""
    choice = choose(costs, probe.sizes, room)
    if choice is None or not probe.may_pad_instead or any(cost.recorded for cost in costs):
        return choice is not None
    return not _is_long(choice, probe) or not any(probe.may_record(room, cost) for cost in costs)


def _measured_kinds(probe: "_Probe", room: int) -> list[PassCost]:
    """Passes without checkpointing, and with it where memory keeps those small."""
    kept = probe.cost(room, checkpointing=False)
    costs = [kept] if kept else []
    if kept is None or _recomputing_may_help(kept, probe, room):
        recomputed = probe.cost(room, checkpointing=True)
        costs += [recomputed] if recomputed else []
    return costs


def _recomputing_may_help(kept: PassCost, probe: "_Probe", room: int) -> bool:
    sizes = probe.sizes
    choice = choose([kept], sizes, room)
    if choice is None:
        return True
    # One size of passes does not tell what of their time is launches.
    unknown = kept.most_tokens == sizes.budget(1, joined=probe.joins) and sizes.sequences > 1
    return unknown or choice.saved_in_one > WORTH_CHECKPOINTING * choice.seconds


@dataclass
class _Probe:
    """Runs passes of a trainer's longest row, forward and backward as in training."""

    trainer: Any
    sizes: StepSizes
    check: Callable[[], None]
    longest: dict[str, Any] = field(init=False)
    joins: bool = field(init=False)
    possible: bool = field(init=False)
    has_recorded: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        rows = self.trainer.train_dataset
        self.longest = rows[self.sizes.lengths.index(self.sizes.longest)]
        sample = self.trainer.data_collator([rows[0], self.longest])
        self.possible = can_be_taken_apart(sample)
        self.joins = "packed_seq_lengths" in sample

    @property
    def steps(self) -> int:
        return int(self.trainer.state.max_steps)

    @property
    def may_pad_instead(self) -> bool:
        """Packed rows hold several sequences that only joined passes keep apart; rows of one length waste no launch."""
        return (
            on_gpu(self.trainer.model) and self.joins and not self.trainer.args.packing and len(self.sizes.widths) > 1
        )

    def cost(self, room: int, *, checkpointing: bool) -> PassCost | None:
        """Measures a pass of one row and one of as many as fit; None when not even one row fits."""
        set_checkpointing(self.trainer.model, on=checkpointing)
        small = self._timed(1, joined=self.joins)
        if small is None:
            return None
        large = small
        for rows in self.sizes.row_counts():
            # Some of what one row takes does not grow with rows, so twice as much is worth a try.
            tried = self._timed(rows, joined=self.joins) if rows > 1 and rows * small[2] <= 2 * room else None
            if tried is not None:
                large = tried
                break
        return self._with_lengths(PassCost.through(self.joins, checkpointing, small, large))

    def _with_lengths(self, cost: PassCost) -> PassCost:
        """The cost with what further lengths add; packed rows have theirs in all passes."""
        lengths = self.sizes.typical_pass(cost.most_tokens)
        if not self.joins or self.trainer.args.packing or len(set(lengths)) == 1:
            return cost
        typical = self._timed(len(lengths), joined=True, lengths=lengths)
        return cost if typical is None else cost.with_lengths(typical[0], len(set(lengths)), typical[1])

    def may_record(self, room: int, joined: PassCost) -> bool:
        """True when all shapes of whole steps fit together, by what the same passes take joined."""
        return joined.memory_recorded(self.sizes) <= room

    def recorded_cost(self, joined: PassCost) -> PassCost | None:
        """Measures padded passes of whole steps, in every width that they will have; None when they do not fit.

        A width takes a second when it comes first, which the training is spared. What is recorded keeps its memory, and
        so does a pass that did not fit while it was: so ask `may_record` first.
        """
        sizes = self.sizes
        self.has_recorded = True
        set_checkpointing(self.trainer.model, on=joined.checkpointing)
        measured: list[tuple[int, float, float]] = []
        for width in reversed(sizes.widths):
            timed = self._timed(sizes.sequences, joined=False, lengths=[width] * sizes.sequences)
            if timed is None:
                return None
            measured.append(timed)
        large, (tokens, seconds, _) = measured[0], measured[-1]
        # Narrow ones find memory that the wide ones keep, so their own figures would say nothing.
        bytes_of_small = large[2] * tokens / large[0]
        return PassCost.through(False, joined.checkpointing, (tokens, seconds, bytes_of_small), large, recorded=True)

    def _timed(self, rows: int, *, joined: bool, lengths: list[int] | None = None) -> tuple[int, float, float] | None:
        """Tokens, seconds and bytes of a pass of so many of the longest rows; None when it does not fit.

        Args:
            rows: Of the pass.
            joined: As in Split.
            lengths: Tokens that each of them is cut to; None = none is cut.
        """
        self.free()
        held, peak = memory_bytes(), Peak()
        try:
            # The first one compiles and fills caches.
            tokens, _ = self._pass(rows, joined=joined, lengths=lengths)
            seconds = min(self._pass(rows, joined=joined, lengths=lengths)[1] for _ in range(TIMED_PASSES))
        except Exception as error:
            if exhausted(error, "") is None:
                raise
            # The traceback's frames hold the tensors that did not fit.
            traceback.clear_frames(error.__traceback__)
            return None
        finally:
            self.free()
        return tokens, seconds, float(max(peak.bytes() - held, 0))

    def _pass(self, rows: int, *, joined: bool, lengths: list[int] | None) -> tuple[int, float]:
        self.check()
        trainer = self.trainer
        sequences = sequences_of(trainer.data_collator([self.longest] * rows))
        if lengths is not None:
            pairs = zip(sequences, lengths, strict=True)
            sequences = [Sequence(each.ids[:length], each.labels[:length]) for each, length in pairs]
        inputs = _inputs(sequences, self.sizes, _pad_token_id(trainer), joined=joined)
        tokens = int(inputs["input_ids"].numel())
        learnt = max(int((inputs["labels"] != IGNORED_LABEL).sum()), 1)
        wait_for_device(trainer)
        begin = time.perf_counter()
        trainer.one_pass(trainer.model_wrapped, inputs, learnt, of_few_shapes=not joined)
        wait_for_device(trainer)
        return tokens, time.perf_counter() - begin

    def free(self) -> None:
        """Gives back gradients and what the allocator keeps: the peak is read from it."""
        import torch

        self.trainer.model.zero_grad(set_to_none=True)
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
