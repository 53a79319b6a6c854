"""OpenTelemetry traces of a real server, as a collector receives them."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from doubles.fake_worker import fake_row
from support.calls import CALL_SECONDS, error_of, inline, prepared_model, train
from support.certificates import Authority
from support.collectors import Collector, GrpcCollector, HttpCollector, attributes
from support.running_server import RunningServer, a_model
from support.uploads import as_jsonl, upload
from support.waiting import wait_until
from unslothd.v1 import service_pb2 as pb
from unslothd.v1.service_pb2_grpc import UnslothServiceStub

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT = "00f067aa0ba902b7"


@pytest.fixture(scope="module", params=[HttpCollector, GrpcCollector])
def collector(request: pytest.FixtureRequest) -> Iterator[Collector]:
    running = request.param()
    yield running
    running.close()


@pytest.fixture(scope="module")
def server(collector: Collector, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    folder, verbose = tmp_path_factory.mktemp("server"), ("--verbose",)
    with RunningServer(folder, fake_workers=True, arguments=verbose, environment=collector.environment) as running:
        a_model(running, "tiny")
        yield running


def test_a_call_is_a_span_below_that_of_its_caller(
    server: RunningServer, stub: UnslothServiceStub, collector: Collector
):
    metadata = (("traceparent", f"00-{TRACE}-{PARENT}-01"),)
    stub.ListModels(pb.ListModelsRequest(), metadata=metadata, timeout=CALL_SECONDS)
    (span,) = collector.spans_of("ListModels")
    assert (span.trace_id.hex(), span.parent_span_id.hex()) == (TRACE, PARENT)
    assert span.name == "unslothd.v1.UnslothService/ListModels"
    found = attributes(span)
    assert (found["rpc.system"], found["rpc.method"], found["rpc.grpc.status_code"]) == ("grpc", "ListModels", 0)
    assert found["unslothd.caller"] == "local"
    assert collector.services == {"unslothd"}
    assert f'"trace_id": "{TRACE}"' in server.log.read_text()


def test_the_span_of_a_training_names_it_and_its_model(stub: UnslothServiceStub, collector: Collector):
    with prepared_model(stub, "tiny") as model:
        events = list(train(stub, model.model_id, inline([fake_row(steps=1)])))
    (span,) = collector.spans_of("Train")
    found = attributes(span)
    assert (found["unslothd.training_id"], found["unslothd.model_id"]) == (events[0].training_id, model.model_id)
    assert span.end_time_unix_nano > span.start_time_unix_nano


def test_what_the_caller_did_wrong_is_no_error_of_the_server(stub: UnslothServiceStub, collector: Collector):
    error_of(lambda: stub.GetModel(pb.GetModelRequest(model_id="none"), timeout=CALL_SECONDS))
    (span,) = collector.spans_of("GetModel")
    found = attributes(span)
    assert (found["rpc.grpc.status_code"], found["unslothd.reason"]) == (
        grpc.StatusCode.NOT_FOUND.value[0],
        "MODEL_NOT_FOUND",
    )
    assert span.status.code == 0


def test_workers_and_checks_of_rows_start_while_spans_are_sent_and_calls_to_the_collector_are_no_spans(
    stub: UnslothServiceStub, collector: Collector
):
    for number in range(3):
        upload(stub, as_jsonl([{"text": f"row {number}"}]))
        with prepared_model(stub, "tiny"):
            pass
    wait_until(lambda: len(collector.spans_of("UploadDataset")) == 3)
    assert {span.name.rpartition("/")[0] for span in collector.spans} == {"unslothd.v1.UnslothService"}


def test_what_is_left_is_sent_when_the_server_stops(collector: Collector, tmp_path: Path):
    environment = {**collector.environment, "OTEL_BSP_SCHEDULE_DELAY": "600000"}
    with RunningServer(tmp_path, fake_workers=True, environment=environment) as server:
        with server.channel() as channel:
            UnslothServiceStub(channel).ListDatasets(pb.ListDatasetsRequest(), timeout=CALL_SECONDS)
        assert not any(span.name.endswith("/ListDatasets") for span in collector.spans)
        assert server.stop() == 0
    assert len(collector.spans_of("ListDatasets")) == 1


def log_of_a_server(tmp_path: Path, **environment: str) -> str:
    """Starts a server, makes a call, ends it; returns its log."""
    with RunningServer(tmp_path, fake_workers=True, environment=environment) as server:
        with server.channel() as channel:
            UnslothServiceStub(channel).ListModels(pb.ListModelsRequest(), timeout=CALL_SECONDS)
        assert server.stop() == 0
        return server.log.read_text()


def test_over_grpc_certificate_and_headers_are_those_of_the_variables(tmp_path: Path):
    authority = Authority(tmp_path / "authority")
    collector = GrpcCollector(authority.server())
    secured = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": f"https://{collector.address}",
        "OTEL_EXPORTER_OTLP_CERTIFICATE": str(authority.ca),
        "OTEL_EXPORTER_OTLP_HEADERS": "api-key=planted",
    }
    log_of_a_server(tmp_path, **{**collector.environment, **secured})
    collector.close()
    assert len(collector.spans_of("ListModels")) == 1
    assert collector.headers["api-key"] == "planted"


def test_the_variables_of_traces_come_before_the_general_ones(tmp_path: Path):
    collector = GrpcCollector()
    of_traces = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1",
        "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf",
        "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": collector.address,
        "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "grpc",
        "OTEL_EXPORTER_OTLP_TRACES_INSECURE": "true",
    }
    log_of_a_server(tmp_path, **of_traces)
    collector.close()
    assert len(collector.spans_of("ListModels")) == 1


@pytest.mark.parametrize("protocol", ["grpc", "http/protobuf"])
def test_a_collector_that_is_not_there_stops_nothing(tmp_path: Path, protocol: str):
    gone = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1", "OTEL_EXPORTER_OTLP_TIMEOUT": "1"}
    log = log_of_a_server(tmp_path, **gone, OTEL_EXPORTER_OTLP_PROTOCOL=protocol)
    assert '"event": "stopped"' in log


def test_without_the_extra_the_server_says_what_to_install_and_serves(tmp_path: Path):
    hidden = tmp_path / "hidden" / "opentelemetry" / "sdk"
    hidden.mkdir(parents=True)
    (hidden / "__init__.py").write_text('raise ModuleNotFoundError("no opentelemetry.sdk", name="opentelemetry.sdk")')
    path = os.pathsep.join([str(tmp_path / "hidden"), *sys.path])
    log = log_of_a_server(tmp_path, OTEL_TRACES_EXPORTER="otlp", PYTHONPATH=path)
    assert "pip install 'unslothd[otel]'" in log


def test_what_is_not_supported_is_told_and_the_server_serves(tmp_path: Path):
    log = log_of_a_server(tmp_path, OTEL_TRACES_EXPORTER="otlp", OTEL_EXPORTER_OTLP_PROTOCOL="http/json")
    assert "no traces are sent" in log
    assert "OTEL_EXPORTER_OTLP_PROTOCOL=http/json is not supported. Set it to grpc or http/protobuf" in log


def test_a_server_that_is_not_asked_for_traces_or_metrics_imports_neither():
    program = (
        "import sys, unslothd_server.__main__; "
        "print([m for m in sys.modules if m.partition('.')[0] in ('opentelemetry', 'prometheus_client')])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=CALL_SECONDS,
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.stdout.strip() == "[]"
