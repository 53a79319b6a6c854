"""Warm workers of a real server: a load takes the spare, another one follows, and none outlives its server."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from pathlib import Path

import psutil
import pytest

from doubles.fake_worker import fake_row
from doubles.gates import StepGate
from support.calls import CALL_SECONDS, inline, load, prepare, train, watch
from support.running_server import RunningServer, a_model
from support.waiting import wait_until
from unslothd.v1 import service_pb2 as pb
from unslothd.v1.model_pb2 import LoadProgress, Model
from unslothd.v1.service_pb2_grpc import UnslothServiceStub

STARTING, LOADING = LoadProgress.PHASE_STARTING_WORKER, LoadProgress.PHASE_LOADING_WEIGHTS


class Place:
    """Folders on which one server after the other runs; all of their workers are ended at the end."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.gate = folder / "import-gate"
        self.gate.touch()
        self.seen: dict[int, psutil.Process] = {}

    def start(self, spares: int = 1, *arguments: str) -> RunningServer:
        self.server = RunningServer(
            self._folder,
            fake_workers=True,
            arguments=("--warm-workers", str(spares), *arguments),
            environment={"FAKE_IMPORT_GATE": str(self.gate)},
        )
        if not (self.server.model_root / "tiny").exists():
            a_model(self.server, "tiny")
        self.stub: UnslothServiceStub = self.server.stub()
        return self.server

    def workers(self) -> set[psutil.Process]:
        """Workers that this server started."""
        found = set(psutil.Process(self.server.process.pid).children())
        self.seen |= {process.pid: process for process in found}
        return found

    def warm(self) -> int:
        return self.stub.GetServerInfo(pb.GetServerInfoRequest(), timeout=CALL_SECONDS).warm_workers

    def until_warm(self, spares: int = 1) -> set[psutil.Process]:
        wait_until(lambda: self.warm() == spares)
        return self.workers()

    def phases(self) -> list[int]:
        """Loads the model; returns the phases of the load."""
        responses = list(self.stub.LoadModel(pb.LoadModelRequest(model_name="tiny"), timeout=CALL_SECONDS))
        assert responses[-1].model.state == Model.STATE_READY
        return [phase for phase, _ in groupby(response.progress.phase for response in responses[:-1])]

    def close(self) -> None:
        if self.server.process.poll() is None:
            self.workers()
        self.server.__exit__(None, None, None)
        for process in self.seen.values():
            if process.is_running():
                process.kill()


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    place = Place(tmp_path)
    yield place
    place.close()


def are_gone(processes: set[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(processes, timeout=CALL_SECONDS)
    assert alive == []


def test_a_load_takes_the_spare_without_an_import_phase_and_another_one_follows(place: Place):
    place.start()
    (spare,) = place.until_warm()
    assert place.phases() == [LOADING]
    assert spare.is_running()
    second = place.until_warm() - {spare}
    assert len(second) == 1
    assert place.phases() == [LOADING]
    assert len(place.until_warm()) == 3


def test_a_load_takes_a_spare_that_still_imports(place: Place):
    place.gate.unlink()
    place.start()
    wait_until(lambda: "spare-" in place.server.log.read_text())
    call = place.stub.LoadModel(pb.LoadModelRequest(model_name="tiny"), timeout=CALL_SECONDS)
    assert next(call).progress.phase == STARTING
    assert (place.warm(), len(place.workers())) == (0, 1)
    place.gate.touch()
    assert next(response.progress.phase for response in call) == LOADING


def test_two_loads_at_once_share_one_spare(place: Place):
    place.start()
    place.until_warm()
    with ThreadPoolExecutor(2) as pool:
        models = list(pool.map(lambda _: load(place.stub, "tiny").model_id, range(2)))
    assert sorted(models) == ["tiny-unsloth", "tiny-unsloth-2"]
    assert len(place.until_warm()) == 3


def test_a_killed_spare_is_replaced_and_loads_go_on(place: Place):
    place.start()
    (spare,) = place.until_warm()
    spare.kill()
    assert place.phases()[-1] == LOADING
    are_gone({spare})
    assert len(place.until_warm()) == 2


def test_without_spares_no_worker_is_started_before_a_load(place: Place):
    place.start(0)
    assert place.phases() == [STARTING, LOADING]
    assert (place.warm(), len(place.workers())) == (0, 1)


@pytest.mark.parametrize("on_shutdown", ["pause", "continue"])
def test_a_spare_ends_with_its_server_whatever_trainings_do(place: Place, on_shutdown: str):
    place.start(1, "--on-shutdown", on_shutdown)
    spares = place.until_warm()
    assert place.server.stop() == 0
    are_gone(spares)
    assert list(place.server.home.glob("workers/*")) == []


def test_a_spare_of_a_killed_server_ends_by_itself(place: Place):
    place.start()
    spares = place.until_warm()
    place.server.kill()
    are_gone(spares)
    place.start()
    place.until_warm()
    assert len(list(place.server.home.glob("workers/*"))) == 1


def test_a_training_on_a_worker_that_was_a_spare_goes_on_over_a_killed_server(place: Place, tmp_path: Path):
    gate = StepGate(tmp_path / "gate")
    place.start()
    (worker,) = place.until_warm()
    model = prepare(place.stub, load(place.stub, "tiny").model_id)
    events = train(place.stub, model.model_id, inline([fake_row(steps=3, gate=str(gate))]))
    gate.open(1)
    training_id = next(event.training_id for event in events if event.step.step == 1)
    place.server.kill()
    place.start()
    gate.open_all()
    log = list(watch(place.stub, training_id))
    assert [event.step.step for event in log if event.HasField("step")] == [1, 2, 3]
    assert log[-1].HasField("succeeded")
    assert not [event for event in log if event.HasField("recovery")]
    assert worker.is_running()


def test_a_server_that_is_killed_in_the_hand_over_neither_loses_the_model_nor_leaves_two_workers(place: Place):
    place.start()
    (spare,) = place.until_warm()
    spare.suspend()
    loading = place.stub.LoadModel(pb.LoadModelRequest(model_name="tiny"), timeout=CALL_SECONDS)
    bootstrap = next(place.server.home.glob("workers/spare-*/bootstrap.binpb"))
    wait_until(lambda: b"tiny-unsloth" in bootstrap.read_bytes())
    assert loading.is_active()
    place.server.kill()
    spare.resume()
    place.start()
    request = pb.GetModelRequest(model_id="tiny-unsloth")
    wait_until(lambda: place.stub.GetModel(request, timeout=CALL_SECONDS).model.state == Model.STATE_READY)
    are_gone({spare})
    assert len(place.until_warm()) == 2
