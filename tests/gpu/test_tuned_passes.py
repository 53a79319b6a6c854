"""Tuned passes on a GPU: the losses of the fixed ones, on rows of mixed and of full length."""

import gc
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from support import engine_runs
from support.engine_runs import Loaded, Row, Run
from unslothd.v1.training_event_pb2 import TrainingEvent
from unslothd.v1.training_pb2 import MICRO_BATCHING_TUNED, TrainingConfig
from unslothd_server.engine.micro_batching import Choice, PassCost, StepSizes, choose
from unslothd_server.engine.recorded_passes import shapes_counted
from unslothd_server.engine.widths import MOST_WIDTHS
from unslothd_server.worker.ports import StopSignal

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(540)]

MAX_SEQ_LENGTH = 1024
WORDS = ["fox", "dog", "sea", "old", "man", "story", "language", "number", "answer", "question"]
# Rounding of bfloat16 in other shapes of passes; a row that is in another step changes a loss by a hundred times more.
RELATIVE_DIFFERENCE = 2e-3
# Recorded passes would keep gigabytes.
FRAGMENTS_BYTES = 512 * 1024 * 1024


def rows_of(lengths: list[int]) -> list[Row]:
    drawn = random.Random(1)
    return [{"text": " ".join(drawn.choices(WORDS, k=length))} for length in lengths]


@dataclass
class Recorded:
    """Shapes that Unsloth counted, in each class of layers that it compiles, and whether it still records.

    Args:
        during: At the last step.
        after: The training.
    """

    during: list[tuple[int, bool]] = field(default_factory=list)
    after: list[tuple[int, bool]] = field(default_factory=list)


def counted(loaded: Loaded) -> list[tuple[int, bool]]:
    forwards = {type(module).forward for module in loaded.torch_model.modules()}
    found = [each for each in map(shapes_counted, forwards) if each is not None]
    return [(len(shapes), not given_up[0]) for shapes, given_up in found]


def trained(
    base: Path,
    folder: Path,
    rows: list[Row],
    config: TrainingConfig,
    *,
    steps: int = 0,
    load_in_4bit: bool = False,
    recorded: Recorded | None = None,
) -> Run:
    """A training of a model of its own, so that both start from the same weights; 0 steps = to its end."""
    folder.mkdir()
    loaded: Loaded = engine_runs.load(base, folder, load_in_4bit=load_in_4bit, max_seq_length=MAX_SEQ_LENGTH)
    loaded.prepare(checkpointing=True)

    def end(event: TrainingEvent, stop: StopSignal) -> None:
        if steps and event.step.step == steps:
            stop.requested.set()
            if recorded is not None:
                recorded.during = counted(loaded)

    run = loaded.train(rows, config, on_event=end)
    if recorded is not None:
        recorded.after = counted(loaded)
    loaded.engine._loaded = None  # gives the device back before the next model comes
    return run


def held_bytes() -> int:
    """Of the device, without torch's cache and what bitsandbytes keeps of models that are gone.

    Transformers names every embedding to it that an 8-bit optimizer leaves alone, and it forgets none: half a GiB for
    each model at 1B, as much as the bound.
    """
    import torch
    from bitsandbytes.optim import GlobalOptimManager

    GlobalOptimManager.get_instance().module_weight_config_triple.clear()
    gc.collect()
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved()


@pytest.mark.parametrize(("lengths", "steps"), [("mixed", 40), ("full", 16)])
def test_tuned_passes_have_the_loss_curve_of_fixed_ones(base: Path, tmp_path: Path, lengths: str, steps: int):
    drawn = random.Random(0)
    mixed = [min(900, max(20, int(drawn.lognormvariate(5.2, 0.75)))) for _ in range(8 * steps)]
    rows = rows_of(mixed if lengths == "mixed" else [MAX_SEQ_LENGTH + 100] * 8 * steps)
    fixed = TrainingConfig(
        max_steps=steps, warmup_steps=2, learning_rate=2e-4, batch_size=2, gradient_accumulation_steps=4
    )
    tuned = TrainingConfig()
    tuned.CopyFrom(fixed)
    tuned.micro_batching = MICRO_BATCHING_TUNED
    one, other = trained(base, tmp_path / "fixed", rows, fixed), trained(base, tmp_path / "tuned", rows, tuned)
    passes = other.plan.passes
    apart = max(abs(a - b) / b for a, b in zip(other.losses, one.losses, strict=True))
    print(f"{lengths}: most {apart:.1e} apart; fixed {one.losses[-1]:.4f}, tuned {other.losses[-1]:.4f}; {passes}")
    assert passes.max_tokens > 2 * MAX_SEQ_LENGTH or not passes.use_gradient_checkpointing
    assert other.losses == pytest.approx(one.losses, rel=RELATIVE_DIFFERENCE)
    assert one.losses[-1] < one.losses[0]
    assert [step.tokens for step in other.of("step")] == [step.tokens for step in one.of("step")]


@pytest.mark.parametrize("load_in_4bit", [False, True], ids=["16bit", "4bit"])
def test_recorded_passes_of_a_long_training_have_the_loss_curve_of_fixed_ones(
    base: Path, tmp_path: Path, load_in_4bit: bool, monkeypatch: pytest.MonkeyPatch
):
    def recorded_ones(costs: Sequence[PassCost], sizes: StepSizes, room: float) -> Choice | None:
        """Whatever is the fastest beside the other tests on this GPU."""
        return choose([cost for cost in costs if cost.recorded] or costs, sizes, room)

    monkeypatch.setattr("unslothd_server.engine.pass_tuning.choose", recorded_ones)
    steps, drawn = 30, random.Random(0)
    # The last step of an epoch has four rows.
    rows = rows_of([min(900, max(20, int(drawn.lognormvariate(5.2, 0.75)))) for _ in range(8 * (steps - 10) + 4)])
    # So long that it is worth to compile layers and to record their launches; it is ended long before.
    fixed = TrainingConfig(
        max_steps=100_000,
        warmup_steps=2,
        learning_rate=2e-4,
        lr_scheduler_type="constant_with_warmup",
        batch_size=2,
        gradient_accumulation_steps=4,
    )
    tuned = TrainingConfig()
    tuned.CopyFrom(fixed)
    tuned.micro_batching = MICRO_BATCHING_TUNED
    one = trained(base, tmp_path / "fixed", rows, fixed, steps=steps, load_in_4bit=load_in_4bit)
    held = held_bytes()
    recorded = Recorded()
    other = trained(base, tmp_path / "tuned", rows, tuned, steps=steps, load_in_4bit=load_in_4bit, recorded=recorded)
    apart = max(abs(a - b) / b for a, b in zip(other.losses, one.losses, strict=True))
    told, taken = other.plan.memory_estimate_bytes, max(step.peak_memory_bytes for step in other.of("step"))
    print(f"recorded: most {apart:.1e} apart; {other.plan.passes}{recorded}; {told} bytes told, {taken} taken")
    assert not other.plan.passes.joined
    # Every width, and no other shape; the next training may record as many again.
    assert recorded.during
    assert all(0 < shapes <= MOST_WIDTHS and records for shapes, records in recorded.during)
    assert set(recorded.after) == {(0, True)}
    assert taken == pytest.approx(told, rel=0.15)
    assert other.losses == pytest.approx(one.losses, rel=RELATIVE_DIFFERENCE)
    assert [step.tokens for step in other.of("step")] == [step.tokens for step in one.of("step")]
    # What was recorded is given back with the training.
    still_held = held_bytes()
    print(f"held {held} bytes before and {still_held} after")
    assert still_held < held + FRAGMENTS_BYTES
