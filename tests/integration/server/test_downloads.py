"""DownloadArtifact: artifacts and checkpoints byte for byte, in parts, and what is never sent."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from doubles.fake_worker import fake_row
from support.calls import CALL_SECONDS, error_of, inline, load, prepared_model, train
from support.exports import below, checkpoint_of, download, export, train_job
from support.running_server import RunningServer, a_model
from unslothd.v1 import service_pb2 as pb
from unslothd.v1.artifact_pb2 import TrainingCheckpoint
from unslothd.v1.service_pb2_grpc import UnslothServiceStub
from unslothd.v1.training_pb2 import Training, TrainingConfig


@pytest.fixture(scope="module")
def training(server: RunningServer, stub: UnslothServiceStub) -> Training:
    return train_job(server, stub)


@pytest.fixture
def model_id(server: RunningServer, stub: UnslothServiceStub) -> Iterator[str]:
    with prepared_model(stub, "tiny") as model:
        yield model.model_id


def test_a_download_is_every_file_in_the_order_of_the_names_byte_for_byte(stub: UnslothServiceStub, model_id: str):
    artifact = export(stub, model_id=model_id)
    got = download(stub, artifact_id=artifact.artifact_id)
    assert got.headers == list(artifact.files)
    assert [file.name for file in got.headers] == ["config.json", "model.safetensors"]
    for name, content in got.contents.items():
        assert content == (Path(artifact.path) / name).read_bytes()


def test_a_download_goes_on_at_an_offset_of_its_first_file(stub: UnslothServiceStub, model_id: str):
    artifact = export(stub, model_id=model_id)
    whole = (Path(artifact.path) / "model.safetensors").read_bytes()
    for offset in (0, 1, 1_500_000, len(whole)):
        got = download(stub, artifact_id=artifact.artifact_id, names=["model.safetensors"], offset=offset)
        assert got.contents == {"model.safetensors": whole[offset:]}
        assert got.headers[0].num_bytes == len(whole)
    both = download(stub, artifact_id=artifact.artifact_id, offset=3)
    assert both.contents["model.safetensors"] == whole


def test_an_offset_beyond_the_first_file_is_out_of_range(stub: UnslothServiceStub, model_id: str):
    artifact = export(stub, model_id=model_id)
    error = error_of(lambda: download(stub, artifact_id=artifact.artifact_id, offset=10**9))
    assert (error.code, error.reason) == ("OUT_OF_RANGE", "OFFSET_OUT_OF_RANGE")
    assert error.metadata["num_bytes"] == str(artifact.files[0].num_bytes)


def test_names_that_are_not_there_are_all_told(stub: UnslothServiceStub, model_id: str):
    artifact = export(stub, model_id=model_id)
    names = ["config.json", "nope", "../../etc/passwd"]
    error = error_of(lambda: download(stub, artifact_id=artifact.artifact_id, names=names))
    assert (error.code, error.reason) == ("NOT_FOUND", "ARTIFACT_NOT_FOUND")
    assert "nope" in error.message
    assert "../../etc/passwd" in error.message


def test_a_checkpoint_is_downloaded_whole_with_sums_that_nobody_wrote_down(
    server: RunningServer, stub: UnslothServiceStub, training: Training
):
    for step, folder in ((0, "final"), (2, "checkpoint-2")):
        got = download(stub, checkpoint=checkpoint_of(training, step))
        path = server.output_root / "job" / folder
        assert got.contents == {name: (path / name).read_bytes() for name in sorted(below(path))}
        assert all(len(header.sha256) == 64 for header in got.headers)


def test_links_in_a_checkpoint_are_not_followed(
    server: RunningServer, stub: UnslothServiceStub, training: Training, tmp_path: Path
):
    (tmp_path / "secret").write_text("secret")
    folder = server.output_root / "job" / "final"
    (folder / "link").symlink_to(tmp_path / "secret")
    (folder / "linked").symlink_to(tmp_path)
    try:
        assert not [
            name for name in download(stub, checkpoint=checkpoint_of(training)).contents if name.startswith("link")
        ]
    finally:
        (folder / "link").unlink()
        (folder / "linked").unlink()


def test_a_file_that_became_a_link_is_not_sent(stub: UnslothServiceStub, model_id: str, tmp_path: Path):
    artifact = export(stub, model_id=model_id)
    config = Path(artifact.path) / "config.json"
    outside = tmp_path / "outside"
    outside.write_bytes(b"x" * config.stat().st_size)
    config.unlink()
    config.symlink_to(outside)
    error = error_of(lambda: download(stub, artifact_id=artifact.artifact_id))
    assert (error.code, error.reason) == ("NOT_FOUND", "ARTIFACT_NOT_FOUND")


def test_a_file_that_shrinks_while_it_is_sent_is_an_error(stub: UnslothServiceStub, server: RunningServer):
    folder = server.output_root / "shrinking"
    with prepared_model(stub, "tiny") as model:
        config = TrainingConfig(output_dir="shrinking")
        first, *_ = train(stub, model.model_id, inline([fake_row(steps=1)]), training_config=config)
    large = folder / "final" / "large.bin"
    with large.open("wb") as file:
        file.truncate(256 * 2**20)
    checkpoint = TrainingCheckpoint(training_id=first.training_id)
    request = pb.DownloadArtifactRequest(checkpoint=checkpoint, names=["large.bin"])
    responses = stub.DownloadArtifact(request, timeout=CALL_SECONDS)
    assert next(responses).file.num_bytes == 256 * 2**20
    with large.open("r+b") as file:
        file.truncate(2**20)
    error = error_of(lambda: responses)
    assert (error.code, error.reason) == ("NOT_FOUND", "ARTIFACT_NOT_FOUND")
    assert "large.bin" in error.message


def test_a_reader_that_stands_still_holds_no_memory_of_the_server(stub: UnslothServiceStub, server: RunningServer):
    folder = server.output_root / "slow"
    with prepared_model(stub, "tiny") as model:
        config = TrainingConfig(output_dir="slow")
        first, *_ = train(stub, model.model_id, inline([fake_row(steps=1)]), training_config=config)
    with (folder / "final" / "large.bin").open("wb") as file:
        file.truncate(512 * 2**20)
    checkpoint = TrainingCheckpoint(training_id=first.training_id)
    request = pb.DownloadArtifactRequest(checkpoint=checkpoint, names=["large.bin"])
    before = psutil.Process(server.process.pid).memory_info().rss
    responses = stub.DownloadArtifact(request, timeout=CALL_SECONDS)
    next(responses)
    # Other calls are answered meanwhile, and what the stream holds stays at a few chunks.
    for _ in range(20):
        stub.GetServerInfo(pb.GetServerInfoRequest(), timeout=CALL_SECONDS)
    assert psutil.Process(server.process.pid).memory_info().rss - before < 64 * 2**20
    responses.cancel()


def test_an_artifact_whose_files_were_deleted_is_not_found(stub: UnslothServiceStub, model_id: str):
    artifact = export(stub, model_id=model_id)
    (Path(artifact.path) / "model.safetensors").unlink()
    one = error_of(lambda: download(stub, artifact_id=artifact.artifact_id))
    shutil.rmtree(artifact.path)
    whole = error_of(lambda: download(stub, artifact_id=artifact.artifact_id))
    unknown = error_of(lambda: download(stub, artifact_id="artifact-nobody"))
    for error in (one, whole, unknown):
        assert (error.code, error.reason) == ("NOT_FOUND", "ARTIFACT_NOT_FOUND")
    assert "model.safetensors" in one.message
    assert artifact.path in whole.message


def test_an_artifact_is_downloaded_from_the_next_server(tmp_path: Path):
    with RunningServer(tmp_path, fake_workers=True) as server:
        a_model(server, "tiny")
        model = load(server.stub(), "tiny")
        artifact = export(server.stub(), model_id=model.model_id)
        before = download(server.stub(), artifact_id=artifact.artifact_id)
        server.kill()
    with RunningServer(tmp_path, fake_workers=True) as server:
        assert download(server.stub(), artifact_id=artifact.artifact_id) == before
