"""What a probe of recorded passes runs. Launches are recorded on a GPU only: the passes here are played."""

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from unslothd_server.engine import pass_tuning
from unslothd_server.engine.micro_batching import PassCost, StepSizes
from unslothd_server.engine.sequences import Sequence, padded_inputs

LENGTHS = [40, 100, 150, 300, 420, 640]
SIZES = StepSizes(LENGTHS * 10, sequences=4)
JOINED = PassCost(True, False, 0.2, 1e-6, 0.0, 1.0, most_tokens=10**6)


class Trainer:
    """As much of a trainer as a probe asks for; notes the shapes of passes."""

    def __init__(self, most_tokens: int = 10**6) -> None:
        self.shapes: list[tuple[int, ...]] = []
        self.most_tokens = most_tokens
        self.model = self.model_wrapped = torch.nn.Linear(2, 2)
        self.processing_class = SimpleNamespace(pad_token_id=0, eos_token_id=1)
        self.args = SimpleNamespace(device=torch.device("cpu"), packing=False)
        self.train_dataset = [{"input_ids": [5] * length, "labels": [5] * length} for length in SIZES.lengths]

    def data_collator(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        sequences = [Sequence(torch.tensor(row["input_ids"]), torch.tensor(row["labels"])) for row in rows]
        return padded_inputs(sequences, max(map(len, sequences)), 0)

    def one_pass(self, model: Any, inputs: dict[str, Any], learnt: int, *, of_few_shapes: bool) -> None:
        assert of_few_shapes
        if inputs["input_ids"].numel() > self.most_tokens:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        self.shapes.append(tuple(inputs["input_ids"].shape))


@pytest.fixture(autouse=True)
def no_checkpointing(monkeypatch: pytest.MonkeyPatch) -> None:
    def leave(model: Any, *, on: bool) -> None:
        """The model of these tests knows none."""

    monkeypatch.setattr(pass_tuning, "set_checkpointing", leave)


def probe(trainer: Trainer) -> Any:
    return pass_tuning._Probe(trainer, SIZES, check=lambda: None)


def test_every_width_is_recorded_before_the_training_wide_ones_first():
    trainer = Trainer()
    cost = probe(trainer).recorded_cost(JOINED)
    assert [width for _rows, width in dict.fromkeys(trainer.shapes)] == SIZES.widths[::-1]
    # One warms up, one is recorded, one is what the training will run.
    assert Counter(trainer.shapes) == {(SIZES.sequences, width): 3 for width in SIZES.widths}
    assert cost.recorded
    assert not cost.joined
    assert cost.most_tokens == SIZES.sequences * SIZES.widths[-1]


def test_what_does_not_fit_is_not_recorded_further():
    trainer = Trainer(most_tokens=SIZES.sequences * SIZES.widths[-1] - 1)
    made = probe(trainer)
    assert made.recorded_cost(JOINED) is None
    assert made.has_recorded
    assert trainer.shapes == []
