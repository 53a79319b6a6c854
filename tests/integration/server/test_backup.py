"""A backup as docs/operations.md has it: taken while trainings run, used where the old server was, and elsewhere."""

import shutil
from pathlib import Path

import pytest

from doubles.fake_worker import fake_row
from doubles.gates import StepGate
from support.calls import CALL_SECONDS, inline, load, prepare, train, watch
from support.running_server import RunningServer, a_model
from support.waiting import wait_until
from unslothd.v1 import service_pb2 as pb
from unslothd.v1.service_pb2_grpc import UnslothServiceStub
from unslothd.v1.training_pb2 import Training, TrainingConfig


def back_up(server: RunningServer, to: Path) -> None:
    """The home without what belongs to living processes, then the results."""
    shutil.copytree(server.home, to / "home", ignore=shutil.ignore_patterns("workers", "server.lock"))
    shutil.copytree(server.output_root, to / "output")


@pytest.fixture(scope="module")
def backup(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a server with a finished training "done" and one, "half", in step 3; that server and its files are gone."""
    tmp_path = tmp_path_factory.mktemp("backup")
    gate = StepGate(tmp_path / "gates")
    with RunningServer(tmp_path / "old", fake_workers=True) as server:
        a_model(server, "tiny")
        stub = server.stub()
        model = load(stub, "tiny")
        prepare(stub, model.model_id)
        config = TrainingConfig(output_dir="done")
        *_, last = train(stub, model.model_id, inline([fake_row(steps=3)]), training_config=config)
        assert last.HasField("succeeded")
        config = TrainingConfig(output_dir="half", save_steps=1)
        rows = inline([fake_row(steps=5, gate=str(gate))])
        half = train(stub, model.model_id, rows, training_config=config)
        gate.open(1, 2)
        wait_until(lambda: gate.is_reached(3))
        back_up(server, tmp_path / "backup")
        half.close()
        stub.UnloadModel(pb.UnloadModelRequest(model_id=model.model_id, force=True), timeout=CALL_SECONDS)
    shutil.copytree(server.model_root, tmp_path / "backup" / "models")
    shutil.rmtree(tmp_path / "old")
    gate.open_all()
    return tmp_path / "backup"


def trainings(stub: UnslothServiceStub) -> dict[str, Training]:
    answer = stub.ListTrainings(pb.ListTrainingsRequest(), timeout=CALL_SECONDS)
    return {training.config.output_dir: training for training in answer.trainings}


def test_a_backup_in_the_old_place_has_every_training_and_goes_on_with_the_one_that_ran(backup: Path):
    place = backup.parent / "old"
    shutil.copytree(backup, place)
    with RunningServer(place, fake_workers=True) as server:
        found = trainings(server.stub())
        assert found["done"].state == Training.STATE_SUCCEEDED
        events = list(watch(server.stub(), found["half"].training_id))
    assert [event.sequence for event in events] == list(range(1, len(events) + 1))
    assert events[-1].HasField("succeeded")


def test_a_backup_in_another_place_lists_every_training_with_its_events(backup: Path, tmp_path: Path):
    shutil.copytree(backup, tmp_path / "new")
    with RunningServer(tmp_path / "new", fake_workers=True) as server:
        found = trainings(server.stub())
        events = list(watch(server.stub(), found["done"].training_id))
    assert set(found) == {"done", "half"}
    assert events[-1].HasField("succeeded")
