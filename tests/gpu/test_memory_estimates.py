"""What a training is said to need of a GPU is what it takes."""

import random
from pathlib import Path

import pytest

from support import engine_runs
from support.engine_runs import Loaded, Row
from support.gpu_models import RandomModels
from unslothd.v1.training_pb2 import TrainingConfig

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(540)]

MAX_SEQ_LENGTH = 2048
# Tokens of a row, sequences of a pass, checkpointing.
PASSES = [(2048, 2, True), (2048, 4, False), (512, 8, False), (1024, 8, True)]
APART = 0.1


def rows_of(length: int, count: int) -> list[Row]:
    drawn = random.Random(0)
    return [{"text": " ".join(drawn.choices(["fox", "dog", "sea", "old", "man"], k=length))} for _ in range(count)]


def estimate_and_peak(loaded: Loaded, length: int, batch_size: int, *, checkpointing: bool) -> tuple[int, int]:
    config = TrainingConfig(
        max_steps=2,
        warmup_steps=0,
        batch_size=batch_size,
        gradient_accumulation_steps=2,
        use_gradient_checkpointing=checkpointing,
    )
    # A word is at least a token: longer rows are cut to the length of the model, shorter ones have a few more.
    run = loaded.train(rows_of(length, 4 * batch_size), config, name=f"{length}-{batch_size}-{checkpointing}")
    return run.plan.memory_estimate_bytes, run.of("step")[-1].peak_memory_bytes


@pytest.mark.parametrize("load_in_4bit", [False, True], ids=["16bit", "4bit"])
@pytest.mark.parametrize("shape", ["qwen-2.5-0.5b", "llama-3.2-1b", "llama-3.2-3b"])
def test_what_is_told_of_memory_is_within_a_tenth_of_the_peak(
    libraries: None, random_models: RandomModels, tmp_path: Path, shape: str, load_in_4bit: bool
):
    base = random_models.made(shape)
    loaded = engine_runs.load(base, tmp_path, load_in_4bit=load_in_4bit, max_seq_length=MAX_SEQ_LENGTH)
    loaded.prepare(checkpointing=True)  # as the server does by default: Unsloth then keeps inputs of layers in RAM
    found = {passes: estimate_and_peak(loaded, *passes[:2], checkpointing=passes[2]) for passes in PASSES}
    loaded.engine._loaded = None  # gives the device back before the next model comes
    for passes, (estimate, peak) in found.items():
        apart = 100 * (estimate / peak - 1)
        print(
            f"{shape} {'4' if load_in_4bit else '16'} bit {passes}: {estimate / 2**30:.2f} told, "
            f"{peak / 2**30:.2f} GiB taken, {apart:+.1f} %"
        )
    assert {passes: estimate / peak for passes, (estimate, peak) in found.items()} == {
        passes: pytest.approx(1, abs=APART) for passes in PASSES
    }
