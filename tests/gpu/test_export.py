"""Exports of a base that was quantised at its load, on a GPU: in 16 and 4 bits, read by plain transformers."""

import hashlib
import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from support import engine_runs
from support.engine_runs import Loaded
from unslothd.v1.artifact_pb2 import ExportFormat
from unslothd.v1.training_pb2 import TrainingConfig
from unslothd.worker.v1.worker_service_pb2 import ExportModelRequest

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(540)]

PROMPT = "The quick brown fox"
# The largest differences that were seen on an H100 are 0.13 for 16 bits, from rounding alone, and 2.4 for 4 bits.
MEAN_DIFFERENCE_16BIT, MEAN_DIFFERENCE_4BIT = 0.05, 0.6

PLAIN_LOGITS = """
import json, sys
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, adapter, prompt = sys.argv[1:]
model, info = AutoModelForCausalLM.from_pretrained(
    folder, device_map={"": 0}, dtype="auto", output_loading_info=True
)
model = (PeftModel.from_pretrained(model, adapter) if adapter else model).eval()
ids = AutoTokenizer.from_pretrained(adapter or folder)(prompt, return_tensors="pt").to("cuda")
with torch.no_grad():
    logits = model(**ids).logits[0, -1].float()
kinds = {type(module).__name__ for module in model.modules()}
problems = [sorted(map(str, info[key])) for key in ("missing_keys", "unexpected_keys")]
print(json.dumps({"logits": logits.tolist(), "is_4bit": "Linear4bit" in kinds, "problems": problems}))
"""


@pytest.fixture(scope="module")
def trained(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    loaded = engine_runs.load(base, tmp_path_factory.mktemp("out"), load_in_4bit=True)
    loaded.prepare()
    rows = [{"text": "The quick brown fox jumps over the lazy dog. " * (1 + number % 3)} for number in range(16)]
    loaded.train(rows, TrainingConfig(max_steps=5, warmup_steps=0, learning_rate=1e-3))
    return loaded


def bits_of(loaded: Loaded) -> dict[str, str]:
    import torch

    return {
        name: hashlib.sha256(tensor.detach().contiguous().view(torch.uint8).cpu().numpy().tobytes()).hexdigest()
        for name, tensor in loaded.torch_model.named_parameters()
    }


def in_plain_transformers(folder: Path | str, adapter: str = "") -> dict[str, Any]:
    command = [sys.executable, "-c", PLAIN_LOGITS, str(folder), adapter, PROMPT]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def mean_difference(some: dict[str, Any], other: dict[str, Any]) -> float:
    pairs = list(zip(some["logits"], other["logits"], strict=True))
    return sum(abs(one - two) for one, two in pairs) / len(pairs)


def test_a_4bit_base_is_exported_in_16_and_in_4_bits_and_stays_as_it_was(trained: Loaded, base: Path):
    before = bits_of(trained)
    folders: dict[str, str] = {}
    for form in ("ADAPTER", "MERGED_16BIT", "MERGED_4BIT"):
        request = ExportModelRequest(
            format=ExportFormat.Value(f"EXPORT_FORMAT_{form}"), output_dir=str(trained.folder / form)
        )
        folders[form] = trained.engine.export(request, lambda progress: None, threading.Event()).path
    assert bits_of(trained) == before
    expected = in_plain_transformers(base, folders["ADAPTER"])
    merged, quantised = in_plain_transformers(folders["MERGED_16BIT"]), in_plain_transformers(folders["MERGED_4BIT"])
    assert merged["problems"] == quantised["problems"] == [[], []]
    assert (merged["is_4bit"], quantised["is_4bit"]) == (False, True)
    assert mean_difference(merged, expected) < MEAN_DIFFERENCE_16BIT
    assert mean_difference(quantised, expected) < MEAN_DIFFERENCE_4BIT
