"""What a probe runs. Sequences are joined, and launches recorded, on a GPU only: the passes here are played."""

from collections import Counter
from collections.abc import Callable
from itertools import groupby
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from support.clock import Clock
from unslothd_server.engine.micro_batching import PassCost, StepSizes
from unslothd_server.engine.sequences import Sequence, joined_inputs, padded_inputs

LENGTHS = [40, 100, 150, 300, 420, 640]
SIZES = StepSizes(LENGTHS * 10, sequences=4)
JOINED = PassCost(True, False, 0.2, 1e-6, 0.0, 1.0, most_tokens=10**6)
ROOM = 10**12
# Seconds of a played pass: whatever is in it, each token, and each run of sequences of one length.
PASS_SECONDS, TOKEN_SECONDS, RUN_SECONDS = 0.1, 1e-5, 0.03


class Trainer:
    """As much of a trainer as a probe asks for; notes the shapes of padded passes and the lengths in joined ones."""

    def __init__(self, most_tokens: int = 10**6, *, joins: bool = False, packing: bool = False) -> None:
        self.shapes: list[tuple[int, ...]] = []
        self.lengths: list[list[int]] = []
        self.clock = Clock()
        self.most_tokens = most_tokens
        self.joins = joins
        self.model = self.model_wrapped = torch.nn.Linear(2, 2)
        self.processing_class = SimpleNamespace(pad_token_id=0, eos_token_id=1)
        self.args = SimpleNamespace(device=torch.device("cpu"), packing=packing)
        self.train_dataset = [{"input_ids": [5] * length, "labels": [5] * length} for length in SIZES.lengths]

    def data_collator(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        sequences = [Sequence(torch.tensor(row["input_ids"]), torch.tensor(row["labels"])) for row in rows]
        return joined_inputs(sequences) if self.joins else padded_inputs(sequences, max(map(len, sequences)), 0)

    def one_pass(self, model: Any, inputs: dict[str, Any], learnt: int, *, of_few_shapes: bool) -> None:
        assert of_few_shapes == ("packed_seq_lengths" not in inputs)
        if inputs["input_ids"].numel() > self.most_tokens:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        self.clock.now += PASS_SECONDS + TOKEN_SECONDS * inputs["input_ids"].numel()
        if of_few_shapes:
            self.shapes.append(tuple(inputs["input_ids"].shape))
        else:
            self.lengths.append(inputs["packed_seq_lengths"].tolist())
            self.clock.now += RUN_SECONDS * len(list(groupby(self.lengths[-1])))


@pytest.fixture
def pass_tuning(versions: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module, which Unsloth's import has to precede."""
    from unslothd_server.engine import pass_tuning

    def leave(model: Any, *, on: bool) -> None:
        """The model of these tests knows no checkpointing."""

    monkeypatch.setattr(pass_tuning, "set_checkpointing", leave)
    return pass_tuning


@pytest.fixture
def probe(pass_tuning: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[[Trainer], Any]:
    def make(trainer: Trainer) -> Any:
        monkeypatch.setattr(pass_tuning, "time", SimpleNamespace(perf_counter=trainer.clock))
        return pass_tuning._Probe(trainer, SIZES, check=lambda: None)

    return make


def test_joined_passes_are_measured_with_the_lengths_that_a_step_has(probe: Callable[[Trainer], Any]):
    trainer = Trainer(joins=True)
    cost = probe(trainer).cost(ROOM, checkpointing=False)
    longest, typical = SIZES.longest, SIZES.typical_pass(4 * SIZES.longest)
    assert [lengths for lengths, _ in groupby(trainer.lengths)] == [[longest], [longest] * 4, typical]
    assert len(set(typical)) > 1
    assert cost.seconds_per_length == pytest.approx(RUN_SECONDS)
    assert cost.time(1000, lengths=4) == pytest.approx(PASS_SECONDS + TOKEN_SECONDS * 1000 + 4 * RUN_SECONDS)


def test_packed_rows_have_their_lengths_in_every_pass(probe: Callable[[Trainer], Any]):
    trainer = Trainer(joins=True, packing=True)
    cost = probe(trainer).cost(ROOM, checkpointing=False)
    assert [lengths for lengths, _ in groupby(trainer.lengths)] == [[SIZES.longest], [SIZES.longest] * 4]
    assert cost.seconds_per_length == 0


@pytest.mark.parametrize(("rows_that_fit", "kinds"), [(4, 1), (1, 2)])
def test_recomputing_is_measured_only_where_steps_need_several_passes(
    pass_tuning: Any, probe: Callable[[Trainer], Any], rows_that_fit: int, kinds: int
):
    # Four rows of typical steps fit into a pass of two of the longest, which takes the least memory of one pass.
    made = probe(Trainer(most_tokens=rows_that_fit * SIZES.longest, joins=True))
    assert len(pass_tuning._measured_kinds(made, ROOM)) == kinds


def test_every_width_is_recorded_before_the_training_wide_ones_first(probe: Callable[[Trainer], Any]):
    trainer = Trainer()
    cost = probe(trainer).recorded_cost(JOINED)
    assert [width for _rows, width in dict.fromkeys(trainer.shapes)] == SIZES.widths[::-1]
    # One warms up, one is recorded, one is what the training will run.
    assert Counter(trainer.shapes) == {(SIZES.sequences, width): 3 for width in SIZES.widths}
    assert cost.recorded
    assert not cost.joined
    assert cost.most_tokens == SIZES.sequences * SIZES.widths[-1]


def test_what_does_not_fit_is_not_recorded_further(probe: Callable[[Trainer], Any]):
    trainer = Trainer(most_tokens=SIZES.sequences * SIZES.widths[-1] - 1)
    made = probe(trainer)
    assert made.recorded_cost(JOINED) is None
    assert made.has_recorded
    assert trainer.shapes == []
