"""Exports over gRPC with real Unsloth: a loaded model and a checkpoint; plain transformers reads what was sent."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from support.calls import inline, prepared_model, train
from support.exports import Downloaded, download, export
from support.running_server import RunningServer
from unslothd.v1.artifact_pb2 import Artifact, TrainingCheckpoint
from unslothd.v1.model_pb2 import LoraConfig
from unslothd.v1.service_pb2_grpc import UnslothServiceStub
from unslothd.v1.training_pb2 import TrainingConfig

pytestmark = pytest.mark.timeout(400)

TEXTS = [{"text": f"The quick brown fox jumps over the lazy dog number {number}."} for number in range(8)]
BF16_TOLERANCE = 0.03

# What a user does with the files, in a process that never heard of Unsloth; an adapter is put on its base first.
PLAIN_LOGITS = """
import json, sys
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base, *folders = sys.argv[1:]
found = []
for folder in folders:
    is_adapter = "adapter" in folder
    model = AutoModelForCausalLM.from_pretrained(base if is_adapter else folder, dtype=torch.float32)
    model = (PeftModel.from_pretrained(model, folder) if is_adapter else model).eval()
    ids = AutoTokenizer.from_pretrained(folder)("The quick brown fox", return_tensors="pt")
    with torch.no_grad():
        found.append(model(**ids).logits[0, -1].tolist())
assert "unsloth" not in sys.modules
print(json.dumps(found))
"""


def unpack(got: Downloaded, folder: Path) -> Path:
    folder.mkdir()
    for name, content in got.contents.items():
        (folder / name).write_bytes(content)
    return folder


def test_a_loaded_model_and_a_checkpoint_are_merged_downloaded_and_read_by_plain_transformers(
    server: RunningServer, stub: UnslothServiceStub, tmp_path: Path
):
    config = TrainingConfig(
        max_steps=4, warmup_steps=0, learning_rate=2e-2, save_steps=2, gradient_accumulation_steps=1
    )
    with prepared_model(stub, "tiny", config, lora=LoraConfig(r=8)) as model:
        *_, last = train(stub, model.model_id, inline(TEXTS))
        checkpoint = TrainingCheckpoint(training_id=last.training_id, step=2)
        artifacts: dict[str, Artifact] = {
            "live-merged": export(stub, model_id=model.model_id),
            "live-adapter": export(stub, "ADAPTER", model_id=model.model_id),
            "step-2-merged": export(stub, checkpoint=checkpoint),
            "step-2-adapter": export(stub, "ADAPTER", checkpoint=checkpoint),
        }
        again = list(train(stub, model.model_id, inline(TEXTS)))
    assert again[-1].HasField("succeeded")
    folders: list[Path] = []
    for name, artifact in artifacts.items():
        got = download(stub, artifact_id=artifact.artifact_id)
        assert got.headers == list(artifact.files)
        assert all((Path(artifact.path) / each).read_bytes() == content for each, content in got.contents.items())
        folders.append(unpack(got, tmp_path / name))
    command = [sys.executable, "-c", PLAIN_LOGITS, str(server.model_root / "tiny"), *map(str, folders)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    live, live_adapter, early, early_adapter = json.loads(done.stdout)
    assert live == pytest.approx(live_adapter, abs=BF16_TOLERANCE)
    assert early == pytest.approx(early_adapter, abs=BF16_TOLERANCE)
    assert early != pytest.approx(live, abs=5 * BF16_TOLERANCE)
