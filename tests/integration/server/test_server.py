"""The server process itself: what it tells, what it refuses, how it ends and comes back."""

import subprocess
import sys
import threading
from pathlib import Path

import grpc
import psutil
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from doubles.fake_worker import fake_row
from doubles.gates import StepGate
from support.calls import CALL_SECONDS, error_of, inline, load, prepared_model, train, watch
from support.running_server import RunningServer, a_model
from unslothd.v1 import service_pb2 as pb
from unslothd.v1.service_pb2_grpc import UnslothServiceStub


def test_the_server_tells_versions_devices_and_limits(stub: UnslothServiceStub):
    info = stub.GetServerInfo(pb.GetServerInfoRequest(), timeout=CALL_SECONDS)
    assert set(info.engine_versions) >= {"unsloth", "torch", "transformers", "trl", "peft"}
    assert info.devices[0].total_memory_bytes > info.devices[0].free_memory_bytes > 0
    assert info.limits.max_inline_bytes == 4 * 1024 * 1024
    assert info.limits.max_message_bytes == 10 * 1024 * 1024


def test_the_server_process_never_imports_torch_or_unsloth(server: RunningServer, stub: UnslothServiceStub):
    with prepared_model(stub, "tiny") as model:
        list(train(stub, model.model_id, inline([fake_row(steps=2)])))
        mapped = Path(f"/proc/{server.process.pid}/maps").read_text()
        assert not [name for name in ("torch", "bitsandbytes", "tokenizers") if f"/{name}/" in mapped]
        assert psutil.Process(server.process.pid).memory_info().rss < 110 * 1024 * 1024


def test_health_answers_for_the_service(server: RunningServer):
    with server.channel() as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for name in ("", "unslothd.v1.UnslothService"):
            answer = health.Check(health_pb2.HealthCheckRequest(service=name), timeout=CALL_SECONDS)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING


def test_reflection_lists_the_service(server: RunningServer):
    with server.channel() as channel:
        services = list(ProtoReflectionDescriptorDatabase(channel).get_services())
    assert "unslothd.v1.UnslothService" in services


def test_a_message_of_20_mib_is_refused_with_the_limit(stub: UnslothServiceStub):
    request = pb.TrainRequest(model_id="m", train_dataset=inline(["x" * (20 * 1024 * 1024)]))
    error = error_of(lambda: stub.Train(request, timeout=CALL_SECONDS))
    assert (error.code, error.reason) == ("RESOURCE_EXHAUSTED", "MESSAGE_TOO_LARGE")
    assert error.metadata["max_bytes"] == str(10 * 1024 * 1024)


def test_inline_rows_beyond_their_limit_name_the_field(stub: UnslothServiceStub):
    request = pb.TrainRequest(model_id="m", train_dataset=inline(["x" * (5 * 1024 * 1024)]))
    error = error_of(lambda: stub.Train(request, timeout=CALL_SECONDS))
    assert (error.code, error.fields) == ("INVALID_ARGUMENT", ["train_dataset.inline.data"])


def test_bytes_that_are_no_message_are_an_invalid_argument(server: RunningServer):
    with server.channel() as channel:
        call = channel.unary_unary("/unslothd.v1.UnslothService/GetModel")
        error = error_of(lambda: call(b"\xff\xff\xff", timeout=CALL_SECONDS))
    assert (error.code, error.reason) == ("INVALID_ARGUMENT", "INVALID_FIELD")


def test_a_bad_setting_ends_the_start_with_every_problem():
    command = [sys.executable, "-m", "unslothd_server", "--listen", "0.0.0.0:1", "--max-loaded-models", "0"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 2
    assert [line.split(":")[0] for line in ended.stderr.splitlines()[1:]] == ["--listen", "--max-loaded-models"]


def test_a_port_that_is_taken_is_told_and_not_shared(server: RunningServer, tmp_path: Path):
    command = [sys.executable, "-m", "unslothd_server", "--listen", server.target, "--home", str(tmp_path / "home")]
    command += ["--output-root", str(tmp_path / "output")]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 1
    assert "cannot listen" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_stop_ends_watches_with_unavailable_unloads_the_models_and_leaves_no_process(tmp_path: Path):
    gate = StepGate(tmp_path / "gate")
    with RunningServer(tmp_path, fake_workers=True) as server:
        a_model(server, "tiny")
        stub = server.stub()
        model = load(stub, "tiny")
        stub.PrepareForTraining(pb.PrepareForTrainingRequest(model_id=model.model_id), timeout=CALL_SECONDS)
        request = pb.TrainRequest(model_id=model.model_id, train_dataset=inline([fake_row(steps=9, gate=str(gate))]))
        call = stub.Train(request, timeout=CALL_SECONDS)
        next(call)
        children = psutil.Process(server.process.pid).children(recursive=True)
        ended = threading.Event()
        error = {}

        def read() -> None:
            try:
                list(call)
            except grpc.RpcError as caught:
                error["code"] = caught.code()
            ended.set()

        threading.Thread(target=read, daemon=True).start()
        assert server.stop() == 0
        assert ended.wait(CALL_SECONDS)
        assert error["code"] == grpc.StatusCode.UNAVAILABLE
        assert children
        assert not [child for child in children if child.is_running()]


def test_a_second_server_on_the_same_home_is_refused_and_harms_nothing(tmp_path: Path):
    gate = StepGate(tmp_path / "gate")
    with RunningServer(tmp_path, fake_workers=True) as server:
        a_model(server, "tiny")
        stub = server.stub()
        with prepared_model(stub, "tiny") as model:
            events = train(stub, model.model_id, inline([fake_row(steps=2, gate=str(gate))]))
            next(events)
            command = [sys.executable, "-m", "unslothd_server", "--listen", "127.0.0.1:0", "--home", str(server.home)]
            command += ["--output-root", str(server.output_root)]
            second = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
            assert second.returncode == 1
            assert str(server.process.pid) in second.stderr
            assert "--home" in second.stderr
            gate.open_all()
            assert list(events)[-1].HasField("succeeded")


def test_a_new_server_shows_the_trainings_of_the_one_before(tmp_path: Path):
    with RunningServer(tmp_path, fake_workers=True) as server:
        a_model(server, "tiny")
        with prepared_model(server.stub(), "tiny") as model:
            before = list(train(server.stub(), model.model_id, inline([fake_row(steps=3)])))
    with RunningServer(tmp_path, fake_workers=True) as server:
        assert list(watch(server.stub(), before[0].training_id)) == before
