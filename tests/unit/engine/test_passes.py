"""Passes cut into parts: whole sequences, in their order, nothing lost; and the ladder when memory runs out."""

from typing import Any

import pytest
import torch

from unslothd.v1.training_pb2 import TrainingConfig
from unslothd_server.engine.passes import PassSplit, StepPasses, parts_of, split_config
from unslothd_server.errors import ExhaustedError

LENGTHS = [3, 5, 2, 4]


def padded() -> dict[str, Any]:
    width = max(LENGTHS)
    mask = torch.tensor([[1] * length + [0] * (width - length) for length in LENGTHS])
    ids = torch.arange(len(LENGTHS) * width).reshape(len(LENGTHS), width) + 1
    return {"input_ids": ids, "labels": ids * mask, "attention_mask": mask}


def joined() -> dict[str, Any]:
    total = sum(LENGTHS)
    ids = torch.arange(total).reshape(1, total) + 1
    positions = torch.cat([torch.arange(length) for length in LENGTHS]).reshape(1, total)
    return {
        "input_ids": ids,
        "labels": ids.clone(),
        "position_ids": positions,
        "packed_seq_lengths": torch.tensor(LENGTHS),
    }


@pytest.mark.parametrize("parts", [1, 2, 4, 8])
def test_padded_rows_are_cut_into_whole_rows_without_needless_padding(parts: int):
    inputs = padded()
    cut = list(parts_of(inputs, parts))
    assert len(cut) == min(parts, len(LENGTHS))
    rows = [row for part in cut for row in part["labels"]]
    for row, whole, length in zip(rows, inputs["labels"], LENGTHS, strict=True):
        assert row[:length].tolist() == whole[:length].tolist()
        assert not row[length:].any()
    if parts >= len(LENGTHS):
        assert [part["input_ids"].shape[1] for part in cut] == LENGTHS


def test_left_padding_is_kept_where_it_is():
    inputs = {name: value.flip(1) for name, value in padded().items()}
    cut = list(parts_of(inputs, 4))
    assert [part["input_ids"].shape for part in cut] == [(1, 5)] * 4


@pytest.mark.parametrize("parts", [2, 3, 4, 9])
def test_joined_sequences_are_cut_between_sequences(parts: int):
    inputs = joined()
    cut = list(parts_of(inputs, parts))
    assert torch.cat([part["input_ids"] for part in cut], dim=1).equal(inputs["input_ids"])
    assert torch.cat([part["packed_seq_lengths"] for part in cut]).tolist() == LENGTHS
    for part in cut:
        assert part["position_ids"][0, 0] == 0
        assert part["input_ids"].shape[1] == int(part["packed_seq_lengths"].sum())


class Device:
    """A device that holds so many sequences a pass, more with checkpointing; a toy model that sums what it saw."""

    def __init__(self, room: int, room_with_checkpointing: int | None = None) -> None:
        self.room, self.room_with_checkpointing = room, room_with_checkpointing or room
        self.checkpointing = False
        self.gradient = 0
        self.repairs: list[tuple[int, bool]] = []
        self.passes = StepPasses(
            batch_size=len(LENGTHS),
            uses_checkpointing=lambda: self.checkpointing,
            use_checkpointing=lambda: setattr(self, "checkpointing", True),
            zero_gradients=lambda: setattr(self, "gradient", 0),
            repaired=lambda split, error: self.repairs.append((split.parts, split.checkpointing)),
        )

    def one_pass(self, inputs: dict[str, Any]) -> torch.Tensor:
        total = inputs["labels"].sum()
        self.gradient += int(total) // 2  # a backward pass that fails half-way has left gradients behind
        if inputs["input_ids"].shape[0] > (self.room_with_checkpointing if self.checkpointing else self.room):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB")
        self.gradient += int(total) - int(total) // 2
        return total


def test_a_step_that_fits_is_run_as_configured():
    device = Device(room=4)
    device.passes.begin_step()
    assert device.passes.run(padded(), device.one_pass) == padded()["labels"].sum()
    assert device.repairs == []


def test_a_pass_that_does_not_fit_is_halved_until_it_does_and_the_step_is_the_same():
    device = Device(room=1)
    device.passes.begin_step()
    whole = int(padded()["labels"].sum())
    assert device.passes.run(padded(), device.one_pass) == whole
    assert device.repairs == [(2, False), (4, False)]
    assert device.gradient == whole
    assert device.passes.run(padded(), device.one_pass) == whole
    assert device.gradient == 2 * whole


def test_passes_of_the_same_step_that_had_fitted_are_run_again():
    device = Device(room=4)
    device.passes.begin_step()
    device.passes.run(padded(), device.one_pass)
    device.room = 2  # somebody else took memory meanwhile
    device.passes.run(padded(), device.one_pass)
    assert device.gradient == 2 * int(padded()["labels"].sum())
    device.passes.begin_step()
    device.gradient = 0
    device.room = 1
    device.passes.run(padded(), device.one_pass)
    assert device.gradient == int(padded()["labels"].sum())


def test_the_last_rung_is_checkpointing():
    device = Device(room=0, room_with_checkpointing=1)
    device.passes.begin_step()
    assert device.passes.run(padded(), device.one_pass) == padded()["labels"].sum()
    assert device.repairs == [(2, False), (4, False), (4, True)]


def test_what_does_not_fit_at_all_is_told_with_the_next_step():
    device = Device(room=0)
    device.passes.begin_step()
    with pytest.raises(ExhaustedError) as caught:
        device.passes.run(padded(), device.one_pass)
    assert caught.value.reason_name == "OUT_OF_MEMORY"
    assert "shorter max_seq_length" in caught.value.message


def test_another_error_is_passed_on_as_it_is():
    device = Device(room=4)
    device.passes.begin_step()

    def broken(inputs: dict[str, Any]) -> torch.Tensor:
        raise ValueError("something else")

    with pytest.raises(ValueError, match="something else"):
        device.passes.run(padded(), broken)
    assert device.repairs == []


def test_the_config_says_what_is_run_now():
    configured = TrainingConfig(batch_size=8, gradient_accumulation_steps=2, use_gradient_checkpointing=False)
    real = split_config(configured, PassSplit(parts=4, checkpointing=True))
    assert (real.batch_size, real.gradient_accumulation_steps, real.use_gradient_checkpointing) == (2, 8, True)
    assert split_config(configured, PassSplit()) == configured
