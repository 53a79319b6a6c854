"""From settings to what watches the server: what is not asked for is not even imported."""

import asyncio
import os
from collections.abc import Mapping

import structlog

from unslothd_server.app.service import Service
from unslothd_server.config import Settings, is_loopback, split_address
from unslothd_server.rpc.observers import CallObserver

log = structlog.get_logger()

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
_PROTOCOL = "http/protobuf"


class Monitoring:
    """Metrics where the settings want them, traces where the variables of OpenTelemetry do.

    Args:
        settings: Checked settings.
        service: What is watched; it lives on the running loop.

    Attributes:
        observers: What calls are to be told to.

    Raises:
        OSError: The address for metrics cannot be taken.
    """

    def __init__(self, settings: Settings, service: Service) -> None:
        self.observers: list[CallObserver] = []
        self._endpoint = None
        self._tracer = None
        if settings.metrics_listen:
            self._serve_metrics(settings.metrics_listen, service)
        self._send_traces(os.environ)

    def _serve_metrics(self, listen: str, service: Service) -> None:
        from prometheus_client import CollectorRegistry, ProcessCollector

        from unslothd_server.metrics.calls import CallMetrics
        from unslothd_server.metrics.collector import ServiceCollector
        from unslothd_server.metrics.endpoint import MetricsEndpoint

        registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        registry.register(ServiceCollector(service, asyncio.get_running_loop()))
        self.observers.append(CallMetrics(registry))
        self._endpoint = MetricsEndpoint(registry, listen)
        log.info("metrics", url=f"http://{self._endpoint.address}/metrics")
        if not is_loopback(split_address(listen)[0]):
            log.warning("other hosts can read the metrics; they need neither TLS nor a token", listen=listen)

    def _send_traces(self, environ: Mapping[str, str]) -> None:
        """What cannot be done is a warning: these variables are often set for a whole host or cluster."""
        exporter = wanted_exporter(environ)
        if not exporter:
            return
        protocol = next((name for name in _PROTOCOLS if environ.get(name, _PROTOCOL) != _PROTOCOL), "")
        if exporter not in ("otlp", "console"):
            log.warning("no traces are sent", cause=f"OTEL_TRACES_EXPORTER={exporter}; use otlp, console or none")
        elif exporter == "otlp" and protocol:
            log.warning("no traces are sent", cause=f"{protocol}={environ[protocol]}; only {_PROTOCOL} is supported")
        else:
            self._trace(exporter)

    def _trace(self, exporter: str) -> None:
        try:
            from unslothd_server.traces import CallTracer
        except ModuleNotFoundError as error:
            log.warning("no traces are sent", cause=f"{error.name} is missing; pip install 'unslothd[otel]'")
            return
        self._tracer = CallTracer(exporter)
        self.observers.append(self._tracer)
        log.info("traces", exporter=exporter)

    async def close(self) -> None:
        """Stops serving, and sends the spans that are left."""
        if self._endpoint is not None:
            await asyncio.to_thread(self._endpoint.close)
        if self._tracer is not None:
            await asyncio.to_thread(self._tracer.close)


def wanted_exporter(environ: Mapping[str, str]) -> str:
    """Returns which exporter the variables of OpenTelemetry ask for; empty = no traces."""
    if environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return ""
    default = "otlp" if any(environ.get(name) for name in _ENDPOINTS) else "none"
    exporter = environ.get("OTEL_TRACES_EXPORTER") or default
    return "" if exporter == "none" else exporter
