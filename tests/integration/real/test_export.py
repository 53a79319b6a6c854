"""Exports over gRPC with real Unsloth: a loaded model and a checkpoint; plain transformers reads what was sent."""

from pathlib import Path

import pytest

from support.calls import inline, prepared_model, train
from support.exports import Downloaded, download, export
from support.plain_transformers import plain_transformers
from support.running_server import RunningServer
from unslothd.v1.artifact_pb2 import Artifact, TrainingCheckpoint
from unslothd.v1.model_pb2 import LoraConfig
from unslothd.v1.service_pb2_grpc import UnslothServiceStub
from unslothd.v1.training_pb2 import TrainingConfig

pytestmark = pytest.mark.timeout(400)

TEXTS = [{"text": f"The quick brown fox jumps over the lazy dog number {number}."} for number in range(8)]
BF16_TOLERANCE = 0.03


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
    folders: dict[str, Path] = {}
    for name, artifact in artifacts.items():
        got = download(stub, artifact_id=artifact.artifact_id)
        assert got.headers == list(artifact.files)
        assert all((Path(artifact.path) / each).read_bytes() == content for each, content in got.contents.items())
        folders[name] = unpack(got, tmp_path / name)
    tiny = server.model_root / "tiny"
    with plain_transformers() as read:
        logits = {name: read(each, tiny if "adapter" in name else None).logits for name, each in folders.items()}
    assert logits["live-merged"] == pytest.approx(logits["live-adapter"], abs=BF16_TOLERANCE)
    assert logits["step-2-merged"] == pytest.approx(logits["step-2-adapter"], abs=BF16_TOLERANCE)
    assert logits["step-2-merged"] != pytest.approx(logits["live-merged"], abs=5 * BF16_TOLERANCE)
