"""Makes a model of random weights for a benchmark.

    _random_model.py FOLDER [SHAPE]

A program of its own, so that torch and its memory are gone before anything is measured. The default shape has 5 million
parameters: 8 sequences of 64 tokens take about half a second a step on 2 cores. Others are those of random_llama.
"""

import sys
from pathlib import Path

import _common  # noqa: F401 - makes the tests' support importable

from support import random_llama

NAME = "llama-5m"
SHAPE = {
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "vocab_size": 640,
    "tie_word_embeddings": True,
    "rope_theta": 10000.0,
}

if __name__ == "__main__":
    random_llama.SHAPES[NAME] = SHAPE
    random_llama.main(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else NAME)
