"""A GPU that really runs out of memory in a training: it is repaired at the same optimizer steps."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from support import engine_runs
from support.engine_runs import Loaded, Row
from unslothd.v1.training_pb2 import TrainingConfig

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(540)]

ROWS: list[Row] = [
    {"text": "The quick brown fox jumps over the lazy dog. " * (20 + 7 * (number % 6))} for number in range(32)
]
CONFIG = TrainingConfig(
    max_steps=4,
    warmup_steps=0,
    learning_rate=1e-4,
    batch_size=8,
    gradient_accumulation_steps=2,
    use_gradient_checkpointing=False,
)
# Rounding in bfloat16 with other sizes of passes.
RELATIVE_DIFFERENCE = 0.02


def prepared(base: Path, folder: Path) -> Loaded:
    folder.mkdir()
    loaded = engine_runs.load(base, folder, load_in_4bit=False, max_seq_length=1024)
    loaded.prepare()
    return loaded


@contextmanager
def at_most(num_bytes: int) -> Iterator[None]:
    """Lets torch's allocator have so much; beyond it raises what a full device raises."""
    import torch

    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(num_bytes / total)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_passes_that_do_not_fit_are_cut_and_the_losses_are_those_of_a_run_that_fits(base: Path, tmp_path: Path):
    import torch

    roomy = prepared(base, tmp_path / "roomy")
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    unbroken = roomy.train(ROWS, CONFIG)
    peak = torch.cuda.max_memory_allocated()
    roomy.engine._loaded = None  # gives the device back before the second model comes
    gc.collect()
    torch.cuda.empty_cache()

    tight = prepared(base, tmp_path / "tight")
    with at_most(held + (peak - held) // 2):
        run = tight.train(ROWS, CONFIG)
    repairs = run.of("recovery")
    print(f"held {held >> 20} MiB, peak {peak >> 20} MiB, losses {unbroken.losses} and {run.losses}")
    print(f"passes {[(each.config.batch_size, each.config.gradient_accumulation_steps) for each in repairs]}")
    assert repairs
    assert all(each.config.batch_size * each.config.gradient_accumulation_steps == 16 for each in repairs)
    assert "out of memory" in repairs[0].cause.message
    assert run.losses == pytest.approx(unbroken.losses, rel=RELATIVE_DIFFERENCE)
    assert [step.tokens for step in run.of("step")] == [step.tokens for step in unbroken.of("step")]
