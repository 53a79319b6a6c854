"""Twenty callers who ask for the same and try again while the server is killed: it is done once."""

import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import grpc
import pytest

from doubles.fake_worker import fake_row
from doubles.gates import StepGate
from support.calls import CALL_SECONDS, inline, load, prepare, watch
from support.running_server import RunningServer, a_model
from support.uploads import as_jsonl, upload
from support.waiting import wait_until
from unslothd.v1 import service_pb2 as pb
from unslothd.v1.service_pb2_grpc import UnslothServiceStub
from unslothd_server.workers.liveness import lock_holder

CALLERS = 20
T = TypeVar("T")


class Place:
    """An address on which one server follows the other."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.target = f"127.0.0.1:{probe.getsockname()[1]}"
        self._folder = folder
        self.server = self._start()

    def _start(self) -> RunningServer:
        return RunningServer(self._folder, fake_workers=True, arguments=("--listen", self.target))

    def kill_and_start(self) -> None:
        self.server.kill()
        assert self.server.process.stdout is not None
        self.server.process.stdout.close()
        self.server = self._start()

    def all_callers(self, call: Callable[[UnslothServiceStub], T], meanwhile: Callable[[], None]) -> list[T]:
        """What the call gives to each of many callers, who make it until it succeeds."""
        with ThreadPoolExecutor(CALLERS) as callers:
            results = [callers.submit(self._until_it_succeeds, call) for _ in range(CALLERS)]
            meanwhile()
            return [result.result(CALL_SECONDS) for result in results]

    def _until_it_succeeds(self, call: Callable[[UnslothServiceStub], T]) -> T:
        end = time.monotonic() + CALL_SECONDS
        with grpc.insecure_channel(self.target, options=[("grpc.max_reconnect_backoff_ms", 200)]) as channel:
            while True:
                try:
                    return call(UnslothServiceStub(channel))
                except grpc.RpcError as error:
                    if error.code() is not grpc.StatusCode.UNAVAILABLE or time.monotonic() > end:
                        raise


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    place = Place(tmp_path)
    yield place
    place.server.__exit__(None, None, None)


def test_twenty_retries_of_a_load_over_a_killed_server_load_one_model(place: Place, tmp_path: Path):
    gate = tmp_path / "gate"
    a_model(place.server, "tiny", load_gate=str(gate))

    def meanwhile() -> None:
        # Not its socket: that is elsewhere where the folder's path is too long for one.
        wait_until(lambda: any(map(lock_holder, place.server.home.glob("workers/*/worker.lock"))))
        place.kill_and_start()
        gate.touch()

    loaded = place.all_callers(lambda stub: load(stub, "tiny", request_id="once").model_id, meanwhile)
    assert set(loaded) == {"tiny-unsloth"}
    models = place.server.stub().ListModels(pb.ListModelsRequest(), timeout=CALL_SECONDS).models
    assert [model.model_id for model in models] == ["tiny-unsloth"]
    assert len(list(place.server.home.glob("workers/*"))) == 1


def test_twenty_retries_of_train_over_a_killed_server_train_once(place: Place, tmp_path: Path):
    a_model(place.server, "tiny")
    gate = StepGate(tmp_path / "gate")
    model = prepare(place.server.stub(), load(place.server.stub(), "tiny").model_id)
    rows = inline([fake_row(steps=3, gate=str(gate))])
    request = pb.TrainRequest(model_id=model.model_id, train_dataset=rows, request_id="once")

    def meanwhile() -> None:
        wait_until(lambda: gate.is_reached(1))
        place.kill_and_start()
        gate.open_all()

    runs = place.all_callers(
        lambda stub: [each.event for each in stub.Train(request, timeout=CALL_SECONDS) if each.event.sequence],
        meanwhile,
    )
    log = list(watch(place.server.stub(), runs[0][0].training_id))
    assert all(events == log for events in runs)
    assert [event.step.step for event in log if event.HasField("step")] == [1, 2, 3]
    trainings = place.server.stub().ListTrainings(pb.ListTrainingsRequest(), timeout=CALL_SECONDS).trainings
    assert len(trainings) == 1


def test_twenty_retries_of_an_upload_over_a_killed_server_store_it_once(place: Place):
    data = as_jsonl({"text": f"row {number} {'x' * 1000}"} for number in range(5000))

    def meanwhile() -> None:
        wait_until(lambda: bool(list(place.server.home.glob("datasets/.upload-*/rows.*"))))
        place.kill_and_start()

    answers = place.all_callers(lambda stub: upload(stub, data), meanwhile)
    assert len({answer.dataset.dataset_id for answer in answers}) == 1
    assert sum(not answer.already_present for answer in answers) <= 1
    stored = place.server.stub().ListDatasets(pb.ListDatasetsRequest(), timeout=CALL_SECONDS).datasets
    assert [dataset.num_bytes for dataset in stored] == [len(data)]
    assert [path.name for path in (place.server.home / "datasets").iterdir()] == [
        stored[0].dataset_id.removeprefix("sha256:")
    ]
