"""A model whose layers are Transformers' own, compiled by Unsloth: joined sequences stay apart in tuned passes too."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from support import engine_runs
from support.engine_runs import Row, Run
from unslothd.v1.training_pb2 import MICRO_BATCHING_TUNED, TrainingConfig
from unslothd_server.engine.unsloth_engine import UnslothEngine

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(540)]

MAX_SEQ_LENGTH = 512
STEPS = 10
WORDS = ["fox", "dog", "sea", "old", "man", "story", "language", "number", "answer", "question"]
FIXED = TrainingConfig(max_steps=STEPS, warmup_steps=1, learning_rate=1e-3, batch_size=2, gradient_accumulation_steps=4)
# Rounding of bfloat16 in other shapes of passes; a sequence that saw the one before it would change a loss by far more.
RELATIVE_DIFFERENCE = 5e-3

MAKE = """
import sys
import torch
from pathlib import Path
from support.tiny_model import build_tiny_llama
from transformers import AutoTokenizer, Olmo2Config, Olmo2ForCausalLM

folder = Path(sys.argv[1])
build_tiny_llama(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
config = Olmo2Config(
    hidden_size=512, intermediate_size=1408, num_hidden_layers=6, num_attention_heads=8, num_key_value_heads=4,
    vocab_size=4096, max_position_embeddings=2048, bos_token_id=tokenizer.bos_token_id,
    eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
)
torch.manual_seed(0)
Olmo2ForCausalLM._from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
"""


@pytest.fixture
def olmo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", MAKE, str(tmp_path / "olmo")], check=True, timeout=120, env=environment)
    UnslothEngine().import_libraries()
    return tmp_path / "olmo"


@pytest.fixture
def rows() -> list[Row]:
    drawn = random.Random(0)
    return [{"text": " ".join(drawn.choices(WORDS, k=drawn.randrange(10, 300)))} for _ in range(8 * STEPS)]


def trained(model: Path, folder: Path, rows: list[Row], config: TrainingConfig) -> Run:
    folder.mkdir()
    loaded = engine_runs.load(model, folder, load_in_4bit=False, max_seq_length=MAX_SEQ_LENGTH)
    loaded.prepare()
    run = loaded.train(rows, config)
    loaded.engine._loaded = None  # gives the device back before the next model comes
    return run


def test_the_losses_of_tuned_passes_are_those_of_fixed_ones(olmo: Path, tmp_path: Path, rows: list[Row]):
    tuned = TrainingConfig(micro_batching=MICRO_BATCHING_TUNED)
    tuned.MergeFrom(FIXED)
    one, other = trained(olmo, tmp_path / "fixed", rows, FIXED), trained(olmo, tmp_path / "tuned", rows, tuned)
    print(f"{other.plan.passes}fixed {one.losses}, tuned {other.losses}")
    assert other.plan.passes.max_tokens > 2 * MAX_SEQ_LENGTH
    assert other.losses == pytest.approx(one.losses, rel=RELATIVE_DIFFERENCE)
    assert one.losses[-1] < one.losses[0]
