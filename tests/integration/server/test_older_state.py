"""What older servers left is gone on with; what a newer one left is refused and not touched."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.calls import CALL_SECONDS, prepared_model, train, watch
from support.exports import download
from support.older_homes import move_in, unpack
from support.running_server import RunningServer
from unslothd.v1 import service_pb2 as pb
from unslothd.v1.dataset_pb2 import DatasetSource
from unslothd.v1.server_info_pb2 import Scope
from unslothd.v1.service_pb2_grpc import UnslothServiceStub
from unslothd.v1.training_pb2 import Training
from unslothd.worker.v1.bootstrap_pb2 import WorkerBootstrap
from unslothd_server.access.tokens import TokenFile
from unslothd_server.event_log import EventLogReader
from unslothd_server.state_versions import STATE_FILES, NewerStateError, StateFile, refuse_newer
from unslothd_server.worker.exit_record import read_exit_record
from unslothd_server.workers.bundle import Bundle

COMMITS = ("b30ecef", "c317962")


def trainings(stub: UnslothServiceStub) -> dict[str, Training]:
    """All trainings by the names of their output folders."""
    answer = stub.ListTrainings(pb.ListTrainingsRequest(), timeout=CALL_SECONDS)
    return {training.config.output_dir: training for training in answer.trainings}


@pytest.mark.parametrize("commit", COMMITS)
def test_results_events_and_datasets_of_an_older_server_are_there_and_of_use(commit: str, tmp_path: Path):
    move_in(commit, tmp_path)
    with RunningServer(tmp_path, fake_workers=True) as server:
        stub = server.stub()
        first = trainings(stub)["first"]
        assert first.state == Training.STATE_SUCCEEDED
        events = list(watch(stub, first.training_id))
        assert [event.sequence for event in events] == list(range(1, 10))
        assert [event.step.loss for event in events if event.HasField("step")] == pytest.approx([2.0, 1.0, 2 / 3])

        (dataset,) = stub.ListDatasets(pb.ListDatasetsRequest(), timeout=CALL_SECONDS).datasets
        assert (dataset.name, dataset.num_rows) == ("kept", 3)
        with prepared_model(stub, "tiny") as model:
            rows = DatasetSource(dataset_id=dataset.dataset_id)
            *_, last = train(stub, model.model_id, rows)
        assert last.HasField("succeeded")


def test_a_training_that_the_first_server_left_running_has_failed_and_says_why(tmp_path: Path):
    move_in("b30ecef", tmp_path)
    with RunningServer(tmp_path, fake_workers=True) as server:
        second = trainings(server.stub())["second"]
        events = list(watch(server.stub(), second.training_id))
    assert second.state == Training.STATE_FAILED
    assert [event.sequence for event in events] == list(range(1, len(events) + 1))
    assert events[-1].HasField("failed")


def test_a_training_that_an_older_server_paused_goes_on_to_its_end_with_its_model(tmp_path: Path):
    move_in("c317962", tmp_path)
    (tmp_path / "gates" / "all").touch()
    with RunningServer(tmp_path, fake_workers=True) as server:
        stub = server.stub()
        events = list(watch(stub, trainings(stub)["second"].training_id))
        (model,) = stub.ListModels(pb.ListModelsRequest(), timeout=CALL_SECONDS).models
    assert [event.sequence for event in events] == list(range(1, len(events) + 1))
    assert [event.step.step for event in events if event.HasField("step")] == [1, 2, 3, 4, 5]
    assert events[-1].HasField("succeeded")
    assert model.model_id == "tiny-unsloth"


def test_an_artifact_of_an_older_server_is_downloaded_whole(tmp_path: Path):
    move_in("c317962", tmp_path)
    (state,) = (tmp_path / "home" / "artifacts").glob("*.json")
    known = json.loads(state.read_text())["artifact"]
    with RunningServer(tmp_path, fake_workers=True) as server:
        got = download(server.stub(), artifact_id=known["artifact_id"])
    sums = {name: hashlib.sha256(content).hexdigest() for name, content in got.contents.items()}
    assert sums == {file["name"]: file["sha256"] for file in known["files"]}


@pytest.mark.parametrize("commit", COMMITS)
def test_every_byte_of_the_first_event_logs_is_understood(commit: str, tmp_path: Path):
    unpack(commit, tmp_path)
    for path in (tmp_path / "home").glob("trainings/*/events.binpb"):
        reader = EventLogReader(path)
        events = [entry.event for entry in reader.read()]
        assert [event.sequence for event in events] == list(range(1, len(events) + 1))
        assert reader.end_offset == path.stat().st_size


def test_the_first_bootstrap_and_exit_record_are_understood(tmp_path: Path):
    unpack("b30ecef", tmp_path)
    bundle = Bundle.open(tmp_path / "home" / "workers" / "idle-unsloth")
    assert (bundle.model_id, bundle.bootstrap.bootstrap_version) == ("idle-unsloth", 1)
    record = read_exit_record(bundle.layout.exit_record, 13958)
    assert record is not None
    assert (record.exit_code, record.reason) == (0, "asked by SIGTERM")


def newer_json(path: Path) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), "version": 99, "of_the_future": True}))


def newer_bootstrap(path: Path) -> None:
    bootstrap = WorkerBootstrap.FromString(path.read_bytes())
    bootstrap.bootstrap_version = 99
    path.write_bytes(bootstrap.SerializeToString())


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but the lock, which a start takes before it looks."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "server.lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.parametrize("kind", STATE_FILES, ids=lambda kind: kind.pattern)
def test_a_newer_file_of_any_kind_is_told_with_its_version(kind: StateFile, tmp_path: Path):
    move_in("b30ecef", tmp_path)
    move_in("c317962", tmp_path)
    TokenFile(tmp_path / "home").create("laptop", Scope.SCOPE_READ, None)
    refuse_newer(tmp_path / "home")
    path = next(iter((tmp_path / "home").glob(kind.pattern)))
    (newer_bootstrap if path.suffix == ".binpb" else newer_json)(path)
    with pytest.raises(NewerStateError) as refused:
        refuse_newer(tmp_path / "home")
    assert f"{path} has version 99, and this server" in str(refused.value)
    assert f"reads up to {kind.newest}" in str(refused.value)


def test_a_home_of_a_newer_server_is_refused_and_keeps_every_byte(tmp_path: Path):
    move_in("b30ecef", tmp_path)
    move_in("c317962", tmp_path)
    path = next((tmp_path / "home").glob("models/*.json"))
    newer_json(path)
    before = contents(tmp_path)
    command = [sys.executable, "-m", "unslothd_server", "--listen", "127.0.0.1:0", "--home", str(tmp_path / "home")]
    command += ["--output-root", str(tmp_path / "output")]
    environment = {**os.environ, "UNSLOTHD_CONFIG": "", "PYTHONPATH": os.pathsep.join(sys.path)}
    for more, code in (([], 1), (["--check"], 2)):
        done = subprocess.run(
            [*command, *more], env=environment, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == code
        assert f"{path} has version 99" in done.stdout + done.stderr
        assert "Start that version again" in done.stdout + done.stderr
    assert contents(tmp_path) == before
