"""How much one caller may do: each limit is told; beyond it a call ends with its reason, and when to try again."""

import itertools
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import grpc
import psutil
import pytest
from google.rpc.error_details_pb2 import RetryInfo
from grpc_status import rpc_status

from doubles.fake_worker import fake_row
from doubles.gates import StepGate
from support.callers import Metadata, info, then_silence, token_of
from support.calls import CALL_SECONDS, error_of, inline
from support.flaky_proxy import FlakyProxy
from support.running_server import RunningServer, a_model
from support.waiting import wait_until
from unslothd.v1 import service_pb2 as pb
from unslothd.v1.dataset_pb2 import DataFormat
from unslothd.v1.service_pb2_grpc import UnslothServiceStub

RATE, BURST = 2.0, 30
LIMITS = {
    "max_requests_per_second": RATE,
    "max_request_burst": BURST,
    "max_streams": 2,
    "max_inline_bytes": 200,
    "max_message_bytes": 1024 * 1024,
    "max_dataset_bytes": 1024 * 1024,
    "max_loaded_models": 3,
    "max_queued_trainings": 4,
    "max_deadline_seconds": 600.0,
    "upload_idle_seconds": 0.5,
    "min_upload_bytes_per_second": 1024.0,
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    settings = itertools.chain.from_iterable(
        (f"--{name.replace('_', '-')}", str(each)) for name, each in LIMITS.items()
    )
    arguments = (*settings, "--require-identity", "yes", "--keepalive-seconds", "1")
    with RunningServer(tmp_path_factory.mktemp("server"), fake_workers=True, arguments=arguments) as running:
        a_model(running, "tiny")
        yield running


@pytest.fixture
def token(server: RunningServer, request: pytest.FixtureRequest) -> Metadata:
    """A caller of this test alone, who has called nothing yet."""
    return token_of(server, f"caller-{abs(hash(request.node.name))}")


def retry_seconds(error: grpc.RpcError) -> float:
    """When the same call may succeed, as the error tells."""
    status, retry = rpc_status.from_call(error), RetryInfo()
    assert any(detail.Unpack(retry) for detail in status.details)
    return retry.retry_delay.ToNanoseconds() / 1e9


def test_every_limit_is_told(stub: UnslothServiceStub, token: Metadata):
    told = info(stub, token).limits
    assert {name: getattr(told, name) for name in LIMITS} == LIMITS


def test_calls_beyond_the_rate_are_refused_with_when_to_try_again_and_others_are_served(
    server: RunningServer, stub: UnslothServiceStub, token: Metadata
):
    def taken() -> bool:
        try:
            info(stub, token)
        except grpc.RpcError as error:
            refusals.append(error)
        return not refusals

    refusals: list[grpc.RpcError] = []
    assert not all(taken() for _ in range(10 * BURST))
    info(stub, token_of(server, "another"))
    assert 0 < retry_seconds(refusals[0]) <= 1 / RATE
    assert error_of(lambda: raised(refusals[0])).reason == "TOO_MANY_REQUESTS"

    def taken_again() -> bool:
        refusals.clear()
        return taken()

    wait_until(taken_again)


def raised(error: grpc.RpcError) -> None:
    raise error


def test_streams_beyond_the_limit_are_refused_until_one_ends(stub: UnslothServiceStub, token: Metadata, tmp_path: Path):
    gate = StepGate(tmp_path / "gate")
    *_, loaded = stub.LoadModel(pb.LoadModelRequest(model_name="tiny"), metadata=token, timeout=CALL_SECONDS)
    model_id = loaded.model.model_id
    stub.PrepareForTraining(pb.PrepareForTrainingRequest(model_id=model_id), metadata=token, timeout=CALL_SECONDS)
    rows = inline([fake_row(steps=1, gate=str(gate))])
    first = stub.Train(pb.TrainRequest(model_id=model_id, train_dataset=rows), metadata=token, timeout=CALL_SECONDS)
    watch = pb.WatchTrainingRequest(training_id=next(first).event.training_id)

    def begin() -> grpc.Call:
        return stub.WatchTraining(watch, metadata=token, timeout=CALL_SECONDS)

    second = begin()
    next(second)
    error = error_of(begin)
    assert (error.code, error.reason) == ("RESOURCE_EXHAUSTED", "TOO_MANY_STREAMS")
    assert error.metadata == {"max_streams": "2"}
    info(stub, token)  # is no stream
    gate.open_all()
    assert [*first][-1].event.HasField("succeeded")
    list(second)
    wait_until(lambda: [*begin()][-1].event.HasField("succeeded"))


def test_models_beyond_the_limit_are_refused_until_one_is_unloaded(stub: UnslothServiceStub, token: Metadata):
    def load() -> str:
        *_, last = stub.LoadModel(pb.LoadModelRequest(model_name="tiny"), metadata=token, timeout=CALL_SECONDS)
        return last.model.model_id

    there = stub.ListModels(pb.ListModelsRequest(), metadata=token, timeout=CALL_SECONDS).models
    own = [load() for _ in range(LIMITS["max_loaded_models"] - len(there))]
    error = error_of(load)
    assert (error.code, error.reason) == ("RESOURCE_EXHAUSTED", "TOO_MANY_MODELS")
    assert "Unload one" in error.message
    stub.UnloadModel(pb.UnloadModelRequest(model_id=own.pop()), metadata=token, timeout=CALL_SECONDS)
    for model_id in (*own, load()):
        stub.UnloadModel(pb.UnloadModelRequest(model_id=model_id), metadata=token, timeout=CALL_SECONDS)


def test_trainings_beyond_the_limit_of_a_models_queue_are_refused(
    server: RunningServer, stub: UnslothServiceStub, token: Metadata, tmp_path: Path
):
    gate = StepGate(tmp_path / "gate")
    *_, loaded = stub.LoadModel(pb.LoadModelRequest(model_name="tiny"), metadata=token, timeout=CALL_SECONDS)
    model_id = loaded.model.model_id
    stub.PrepareForTraining(pb.PrepareForTrainingRequest(model_id=model_id), metadata=token, timeout=CALL_SECONDS)
    rows = inline([fake_row(steps=1, gate=str(gate))])
    request = pb.TrainRequest(model_id=model_id, train_dataset=rows)

    def train(number: int) -> Iterator[pb.TrainResponse]:
        return stub.Train(request, metadata=token_of(server, f"queuing-{number}"), timeout=CALL_SECONDS)

    taken = [train(number) for number in range(1 + LIMITS["max_queued_trainings"])]
    for stream in taken:
        next(stream)
    error = error_of(lambda: train(len(taken)))
    assert (error.code, error.reason) == ("RESOURCE_EXHAUSTED", "QUEUE_FULL")
    gate.open_all()
    assert all([*stream][-1].event.HasField("succeeded") for stream in taken)
    stub.UnloadModel(pb.UnloadModelRequest(model_id=model_id), metadata=token, timeout=CALL_SECONDS)


def test_inline_rows_beyond_the_limit_are_refused_with_the_way_to_send_them(stub: UnslothServiceStub, token: Metadata):
    rows = inline([{"text": "x" * 200}])
    for request in (
        pb.TrainRequest(model_id="m", train_dataset=rows),
        pb.TrainRequest(model_id="m", train_dataset=inline([{"text": "x"}]), eval_dataset=rows),
    ):
        error = error_of(lambda request=request: stub.Train(request, metadata=token, timeout=CALL_SECONDS))
        assert (error.code, error.reason) == ("RESOURCE_EXHAUSTED", "INLINE_ROWS_TOO_LARGE")
        assert error.metadata["max_bytes"] == "200"
        assert "UploadDataset" in error.message


def test_a_deadline_beyond_the_limit_is_refused_and_none_is_taken(stub: UnslothServiceStub, token: Metadata):
    request = pb.ListModelsRequest()
    error = error_of(lambda: stub.ListModels(request, metadata=token, timeout=700))
    assert (error.code, error.reason) == ("RESOURCE_EXHAUSTED", "DEADLINE_TOO_LONG")
    assert error.metadata["max_deadline_seconds"] == "600"
    stub.ListModels(request, metadata=token)


def test_an_upload_that_falls_silent_is_ended_and_leaves_nothing(
    server: RunningServer, stub: UnslothServiceStub, token: Metadata
):
    header = pb.UploadDatasetHeader(name="half", format=DataFormat.DATA_FORMAT_JSONL)
    parts = pb.UploadDatasetRequest(header=header), pb.UploadDatasetRequest(chunk=b'{"text": "a"}\n')
    with then_silence(*parts) as requests:
        error = error_of(lambda: stub.UploadDataset(requests, metadata=token, timeout=CALL_SECONDS))
    assert (error.code, error.reason) == ("ABORTED", "UPLOAD_STALLED")
    wait_until(lambda: not list((server.home / "datasets").iterdir()))


def test_an_upload_that_drips_is_ended_and_leaves_nothing(
    server: RunningServer, stub: UnslothServiceStub, token: Metadata
):
    def drip() -> Iterator[pb.UploadDatasetRequest]:
        yield pb.UploadDatasetRequest(header=pb.UploadDatasetHeader(name="drip", format=DataFormat.DATA_FORMAT_JSONL))
        for _ in range(1000):  # far within upload_idle_seconds each
            over.wait(0.05)
            yield pb.UploadDatasetRequest(chunk=b"\n")

    over = threading.Event()
    try:
        error = error_of(lambda: stub.UploadDataset(drip(), metadata=token, timeout=CALL_SECONDS))
    finally:
        over.set()
    assert (error.code, error.reason) == ("ABORTED", "UPLOAD_STALLED")
    assert "1024 a second" in error.message
    wait_until(lambda: not list((server.home / "datasets").iterdir()))


@pytest.mark.parametrize("rpc", ["ListModels", "WatchTraining", "UploadDataset"])
def test_a_call_whose_request_never_comes_is_ended(server: RunningServer, token: Metadata, rpc: str):
    with server.channel() as channel, then_silence() as requests:
        call = channel.stream_stream(f"/unslothd.v1.UnslothService/{rpc}")
        error = error_of(lambda: call(requests, metadata=token, timeout=CALL_SECONDS))
    assert (error.code, error.reason) == ("ABORTED", "UPLOAD_STALLED")


def test_connections_that_say_nothing_or_fall_silent_are_dropped(server: RunningServer, token: Metadata):
    service = psutil.Process(server.process.pid)
    before = len(service.net_connections())
    host, _, port = server.target.rpartition(":")
    with ExitStack() as ends:
        silent = [ends.enter_context(socket.create_connection((host, int(port)))) for _ in range(3)]
        proxy = ends.enter_context(FlakyProxy(server.target))
        half_open = ends.enter_context(grpc.insecure_channel(proxy.target))
        info(UnslothServiceStub(half_open), token)
        wait_until(lambda: len(service.net_connections()) >= before + 4)
        proxy.fall_silent()
        wait_until(lambda: len(service.net_connections()) <= before)
        for end in silent:
            end.settimeout(CALL_SECONDS)
            while end.recv(1024):  # the server's settings frame, then its end
                pass
