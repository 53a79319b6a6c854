"""Collectors of OpenTelemetry for tests: they take spans over OTLP, by HTTP or by gRPC, as any collector does."""

import threading
from abc import ABC, abstractmethod
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc import (
    TraceServiceServicer,
    add_TraceServiceServicer_to_server,
)

from support.waiting import wait_until


class Collector(ABC):
    """What any of them has taken.

    Attributes:
        address: HOST:PORT that it listens on.
        spans: All, in the order they came.
        services: Names of the services that sent them.
        headers: Of the newest request, by lower-case name.
    """

    protocol: str

    def __init__(self) -> None:
        self.address = ""
        self.spans: list[Any] = []
        self.services: set[str] = set()
        self.headers: dict[str, str] = {}

    @property
    def environment(self) -> dict[str, str]:
        """What a server has to be told to send its spans here, soon."""
        return {
            "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://{self.address}",
            "OTEL_EXPORTER_OTLP_PROTOCOL": self.protocol,
            "OTEL_BSP_SCHEDULE_DELAY": "50",
        }

    def take(self, request: ExportTraceServiceRequest, headers: dict[str, str]) -> None:
        """Keeps what came."""
        self.headers = headers
        for resource in request.resource_spans:
            self.services.add(attributes(resource.resource)["service.name"])
            for scope in resource.scope_spans:
                self.spans.extend(scope.spans)

    def spans_of(self, rpc: str) -> list[Any]:
        """Waits for the first and returns all of an RPC."""
        wait_until(lambda: any(span.name.endswith(f"/{rpc}") for span in self.spans))
        return [span for span in self.spans if span.name.endswith(f"/{rpc}")]

    @abstractmethod
    def close(self) -> None:
        """Stops listening."""


class HttpCollector(Collector):
    """Listens for OTLP over HTTP."""

    protocol = "http/protobuf"

    def __init__(self) -> None:
        super().__init__()
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if self.path == "/v1/traces":
                    headers = {name.lower(): value for name, value in self.headers.items()}
                    collector.take(ExportTraceServiceRequest.FromString(body), headers)
                self.send_response(200)
                self.end_headers()

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class GrpcCollector(Collector):
    """Listens for OTLP over gRPC.

    Args:
        certificate: PEM files with certificate and key; without them it speaks no TLS.
    """

    protocol = "grpc"

    def __init__(self, certificate: tuple[Path, Path] | None = None) -> None:
        super().__init__()
        collector = self

        class Service(TraceServiceServicer):
            def Export(
                self, request: ExportTraceServiceRequest, context: grpc.ServicerContext
            ) -> ExportTraceServiceResponse:
                collector.take(request, dict(context.invocation_metadata()))
                return ExportTraceServiceResponse()

        self._server = grpc.server(ThreadPoolExecutor(2))
        add_TraceServiceServicer_to_server(Service(), self._server)
        if certificate is None:
            port = self._server.add_insecure_port("127.0.0.1:0")
        else:
            chain, key = (file.read_bytes() for file in certificate)
            port = self._server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([(key, chain)]))
        self.address = f"127.0.0.1:{port}"
        self._server.start()

    def close(self) -> None:
        self._server.stop(None).wait()


def attributes(holder: Any) -> dict[str, Any]:
    """Attributes of a span or resource by name."""
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in holder.attributes}
