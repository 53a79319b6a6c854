"""Exports and downloads as tests make them."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from doubles.fake_worker import fake_row
from support.calls import CALL_SECONDS, inline, prepared_model, train
from support.running_server import RunningServer
from unslothd.v1 import service_pb2 as pb
from unslothd.v1.artifact_pb2 import Artifact, ArtifactFile, ExportProgress, TrainingCheckpoint
from unslothd.v1.service_pb2_grpc import UnslothServiceStub
from unslothd.v1.training_pb2 import Training, TrainingConfig

LARGEST_CHUNK = 1 << 20


def exporting(stub: UnslothServiceStub, form: str = "MERGED_16BIT", **fields: Any) -> Iterator[pb.ExportModelResponse]:
    """Begins an export; yields its messages."""
    request = pb.ExportModelRequest(format=f"EXPORT_FORMAT_{form}", **fields)
    return stub.ExportModel(request, timeout=CALL_SECONDS)


def export(stub: UnslothServiceStub, form: str = "MERGED_16BIT", **fields: Any) -> Artifact:
    """Exports to the end and returns the artifact."""
    *_, last = exporting(stub, form, **fields)
    assert last.WhichOneof("result") == "artifact"
    return last.artifact


def phases(responses: Iterator[pb.ExportModelResponse]) -> tuple[list[ExportProgress], Artifact]:
    """The progress of an export, and its artifact."""
    *progress, last = responses
    return [each.progress for each in progress], last.artifact


@dataclass
class Downloaded:
    """Files that came, in the order of their coming; each is checked against its header when it is whole.

    Args:
        headers: As sent.
        contents: Bytes by name, from the offset on.
    """

    headers: list[ArtifactFile] = field(default_factory=list)
    contents: dict[str, bytes] = field(default_factory=dict)


def download(stub: UnslothServiceStub, **fields: Any) -> Downloaded:
    """Downloads to the end."""
    result = Downloaded()
    for response in stub.DownloadArtifact(pb.DownloadArtifactRequest(**fields), timeout=CALL_SECONDS):
        if response.HasField("file"):
            result.headers.append(response.file)
            result.contents[response.file.name] = b""
        else:
            assert 0 < len(response.chunk) <= LARGEST_CHUNK
            result.contents[result.headers[-1].name] += response.chunk
    for header in result.headers:
        content = result.contents[header.name]
        if len(content) == header.num_bytes:
            assert hashlib.sha256(content).hexdigest() == header.sha256
    return result


def train_job(server: RunningServer, stub: UnslothServiceStub) -> Training:
    """Trains into "job": a checkpoint at step 2 and a result; both have what Transformers and PEFT leave in them."""
    with prepared_model(stub, "tiny") as model:
        config = TrainingConfig(save_steps=2, output_dir="job")
        first, *_ = train(stub, model.model_id, inline([fake_row(steps=3)]), training_config=config)
    result = stub.GetTraining(pb.GetTrainingRequest(training_id=first.training_id), timeout=CALL_SECONDS).training
    for folder in (server.output_root / "job" / "final", server.output_root / "job" / "checkpoint-2"):
        (folder / "adapter_config.json").write_text("{}")
        (folder / "adapter_model.safetensors").write_bytes(bytes(range(256)) * 5000)
        (folder / "tokenizer.json").write_text("{}")
        (folder / "optimizer.pt").write_bytes(b"moments")
        (folder / "trainer_state.json").write_text("{}")
    return result


def checkpoint_of(training: Training, step: int = 0) -> TrainingCheckpoint:
    """Names the checkpoint of a step, or the result (0)."""
    return TrainingCheckpoint(training_id=training.training_id, step=step)


def below(folder: Path) -> set[str]:
    """Names of the files below a folder."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
