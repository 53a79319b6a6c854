"""OpenTelemetry traces of a real server, as a collector receives them."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from doubles.fake_worker import fake_row
from integration.server.conftest import a_model
from support.calls import CALL_SECONDS, error_of, inline, prepared_model, train
from support.running_server import RunningServer
from support.waiting import wait_until
from unslothd.v1 import service_pb2 as pb
from unslothd.v1.service_pb2_grpc import UnslothServiceStub

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT = "00f067aa0ba902b7"


class Collector:
    """Takes spans over OTLP/HTTP, as any collector does."""

    def __init__(self) -> None:
        self.spans: list[Any] = []
        self.services: set[str] = set()
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if self.path == "/v1/traces":
                    collector.take(ExportTraceServiceRequest.FromString(body))
                self.send_response(200)
                self.end_headers()

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.start()

    def take(self, request: ExportTraceServiceRequest) -> None:
        for resource in request.resource_spans:
            self.services.add(attributes(resource.resource)["service.name"])
            for scope in resource.scope_spans:
                self.spans.extend(scope.spans)

    def spans_of(self, rpc: str) -> list[Any]:
        """Waits for the first and returns all of an RPC."""
        wait_until(lambda: any(span.name.endswith(f"/{rpc}") for span in self.spans))
        return [span for span in self.spans if span.name.endswith(f"/{rpc}")]

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def attributes(holder: Any) -> dict[str, Any]:
    """Attributes by name."""
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in holder.attributes}


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    running = Collector()
    yield running
    running.close()


@pytest.fixture(scope="module")
def server(collector: Collector, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    environment = {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.endpoint, "OTEL_BSP_SCHEDULE_DELAY": "50"}
    folder = tmp_path_factory.mktemp("server")
    with RunningServer(folder, fake_workers=True, arguments=("--verbose",), environment=environment) as running:
        a_model(running, "tiny")
        yield running


@pytest.fixture(scope="module")
def stub(server: RunningServer) -> Iterator[UnslothServiceStub]:
    with server.channel() as channel:
        yield UnslothServiceStub(channel)


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


def test_what_is_left_is_sent_when_the_server_stops(collector: Collector, tmp_path: Path):
    environment = {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.endpoint, "OTEL_BSP_SCHEDULE_DELAY": "600000"}
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


def test_a_collector_that_is_not_there_stops_nothing(tmp_path: Path):
    gone = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1", "OTEL_EXPORTER_OTLP_TIMEOUT": "1"}
    log = log_of_a_server(tmp_path, **gone)
    assert '"event": "stopped"' in log


def test_without_the_extra_the_server_says_what_to_install_and_serves(tmp_path: Path):
    hidden = tmp_path / "hidden" / "opentelemetry" / "sdk"
    hidden.mkdir(parents=True)
    (hidden / "__init__.py").write_text('raise ModuleNotFoundError("no opentelemetry.sdk", name="opentelemetry.sdk")')
    path = os.pathsep.join([str(tmp_path / "hidden"), *sys.path])
    log = log_of_a_server(tmp_path, OTEL_TRACES_EXPORTER="otlp", PYTHONPATH=path)
    assert "pip install 'unslothd[otel]'" in log


@pytest.mark.parametrize(
    ("name", "value"), [("OTEL_TRACES_EXPORTER", "zipkin"), ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")]
)
def test_what_is_not_supported_is_told_and_the_server_serves(tmp_path: Path, name: str, value: str):
    asked = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1", name: value}
    log = log_of_a_server(tmp_path, **asked)
    assert "no traces are sent" in log
    assert f"{name}={value}" in log


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
