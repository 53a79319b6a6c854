"""A card with little free memory: Unsloth leaves the embedding in RAM, and everything else is as on a large one."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from support import engine_runs
from support.gpu_models import RandomModels
from unslothd.v1.training_pb2 import MICRO_BATCHING_TUNED, TrainingConfig
from unslothd_server.engine.devices import bytes_in_ram, device_name

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(540)]

MAX_SEQ_LENGTH = 2048
# The weights take 2.05 GiB, and Unsloth wants more than half a GiB free for a step of one row.
CARD_BYTES = int(2.7 * 1024**3)
EMBEDDING_BYTES = 32000 * 2048 * 2
ROWS = [{"text": f"{number} is a number. " + "The fox jumps. " * 60} for number in range(16)]


@pytest.fixture
def untied(libraries: None, random_models: RandomModels) -> Path:
    """A model whose input embedding is not its head too."""
    return random_models.made("tinyllama-1.1b")


@contextmanager
def card_of(size: int) -> Iterator[None]:
    """This process gets no more of the card."""
    import torch

    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(size / torch.cuda.mem_get_info()[1])
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_a_model_whose_embedding_is_in_ram_is_on_the_gpu_and_trains_there(untied: Path, tmp_path: Path):
    with card_of(CARD_BYTES):
        loaded = engine_runs.load(untied, tmp_path, load_in_4bit=False, max_seq_length=MAX_SEQ_LENGTH, dtype="bfloat16")
    assert bytes_in_ram(loaded.torch_model) == EMBEDDING_BYTES
    assert loaded.model.device == device_name(loaded.torch_model) == "cuda:0"
    assert any("RAM" in warning for warning in loaded.model.warnings)
    loaded.prepare(checkpointing=True)
    run = loaded.train(
        ROWS, TrainingConfig(max_steps=6, warmup_steps=1, learning_rate=1e-3, micro_batching=MICRO_BATCHING_TUNED)
    )
    print(f"{run.plan.passes}losses {run.losses}, told {run.plan.memory_estimate_bytes}")
    assert bytes_in_ram(loaded.torch_model) == EMBEDDING_BYTES
    assert run.of("started")[0].device.startswith("cuda:0 (")
    assert run.plan.config.bf16
    assert run.plan.passes.max_tokens > 0
    assert all(math.isfinite(loss) for loss in run.losses)
    assert run.losses[-1] < run.losses[0]
