"""OpenTelemetry: a span for each call.

Imported only when traces are asked for; needs the extra `otel`.
"""

from collections.abc import Generator
from contextlib import contextmanager

import grpc
from opentelemetry import propagate
from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_VERSION, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.trace import SpanKind, Status, StatusCode
from structlog.contextvars import bind_contextvars

from unslothd._version import __version__
from unslothd_server.access.audit import CallRecord
from unslothd_server.rpc.observers import Metadata

_SERVICE = "unslothd.v1.UnslothService"
# What the semantic conventions count as errors of a server; all others are the caller's.
_SERVER_ERRORS = frozenset({"UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS"})


class CallTracer:
    """Observes calls (`rpc.observers.CallObserver`). A span ends with its call, so that of a stream comes at its end.

    Args:
        exporter: Sends the spans; it is closed with the tracer.
    """

    def __init__(self, exporter: SpanExporter) -> None:
        self._provider = TracerProvider(resource=_resource(), shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("unslothd", __version__)

    @contextmanager
    def __call__(self, record: CallRecord, metadata: Metadata) -> Generator[None]:
        """Makes the span of one call, a child of the caller's where the metadata names one."""
        carrier = {key: value for key, value in metadata if isinstance(value, str)}
        span = self._tracer.start_span(
            f"{_SERVICE}/{record.rpc}",
            context=propagate.extract(carrier),
            kind=SpanKind.SERVER,
            attributes={
                "rpc.system": "grpc",
                "rpc.service": _SERVICE,
                "rpc.method": record.rpc,
                "unslothd.call_id": record.call_id,
            },
        )
        bind_contextvars(trace_id=f"{span.get_span_context().trace_id:032x}")
        try:
            yield
        finally:
            span.set_attributes({f"unslothd.{name}": value for name, value in record.ids.items()})
            span.set_attribute("unslothd.caller", record.caller.name)
            span.set_attribute("rpc.grpc.status_code", grpc.StatusCode[record.code].value[0])
            if record.reason:
                span.set_attribute("unslothd.reason", record.reason)
            if record.code in _SERVER_ERRORS:
                span.set_status(Status(StatusCode.ERROR, record.reason))
            span.end()

    def close(self) -> None:
        """Sends what is left; blocks, for some seconds when nobody takes it."""
        self._provider.shutdown()


def _resource() -> Resource:
    """As OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES say; the name is "unslothd" where they say none."""
    resource = Resource.create({SERVICE_VERSION: __version__})
    if str(resource.attributes[SERVICE_NAME]).startswith("unknown_service"):
        return resource.merge(Resource({SERVICE_NAME: "unslothd"}))
    return resource
