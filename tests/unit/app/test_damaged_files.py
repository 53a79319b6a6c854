"""Files of state that cannot be read: set aside or passed over, named in the log, and no reason not to start."""

import json
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from unslothd.v1.model_pb2 import Model
from unslothd.v1.service_pb2 import LoadModelRequest
from unslothd.v1.training_pb2 import Training
from unslothd.worker.v1.worker_service_pb2 import StartTrainingRequest
from unslothd_server.app.model_store import ModelStore, StoredModel
from unslothd_server.app.training_store import StoredTraining, TrainingStore

DAMAGE = {
    "empty": b"",
    "no JSON": b"\x00\x00\x00",
    "cut": b'{"version": 1, "mod',
    "a list": b"[1, 2]",
    "null": b"null",
    "fields missing": b"{}",
    "fields of other types": json.dumps({"model": 1, "request": "x", "training": [], "assignment": 2}).encode(),
}
damaged = pytest.mark.parametrize("content", DAMAGE.values(), ids=DAMAGE.keys())


def a_model(model_id: str) -> StoredModel:
    return StoredModel(Model(model_id=model_id), LoadModelRequest(), "source")


@damaged
def test_a_damaged_file_of_a_model_is_set_aside_and_the_others_are_read(tmp_path: Path, content: bytes):
    store = ModelStore(tmp_path)
    store.save(a_model("good"))
    (tmp_path / "bad.json").write_bytes(content)
    with capture_logs() as logs:
        assert [stored.model.model_id for stored in store.load_all()] == ["good"]
    assert [entry["file"] for entry in logs] == [str(tmp_path / "bad.json")]
    assert (tmp_path / "bad.json.unreadable").read_bytes() == content
    with capture_logs() as logs:
        assert [stored.model.model_id for stored in store.load_all()] == ["good"]
    assert logs == []


@damaged
def test_a_damaged_file_of_a_training_is_set_aside_and_the_others_are_read(tmp_path: Path, content: bytes):
    store = TrainingStore(tmp_path / "trainings", tmp_path / "output")
    store.folder_of("good").mkdir()
    store.save(StoredTraining(Training(training_id="good"), StartTrainingRequest(), "", a_model("m")))
    store.folder_of("bad").mkdir()
    path = store.folder_of("bad") / "training.json"
    path.write_bytes(content)
    with capture_logs() as logs:
        assert [stored.training.training_id for stored in store.load_all()] == ["good"]
    assert [entry["file"] for entry in logs] == [str(path)]
    assert path.with_name("training.json.unreadable").read_bytes() == content


def test_a_file_that_is_there_but_cannot_be_opened_keeps_its_name(tmp_path: Path):
    store = ModelStore(tmp_path)
    (tmp_path / "folder.json").mkdir()
    with capture_logs() as logs:
        assert store.load_all() == []
    assert [entry["file"] for entry in logs] == [str(tmp_path / "folder.json")]
    assert (tmp_path / "folder.json").exists()
