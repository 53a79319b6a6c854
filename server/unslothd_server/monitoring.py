"""From settings to what watches the server: what is not asked for is not even imported."""

import asyncio
import os

import structlog

from unslothd_server.app.service import Service
from unslothd_server.config import Settings, is_loopback, split_address
from unslothd_server.rpc.observers import CallObserver
from unslothd_server.trace_exporters import TracesError, make_exporter, wanted_exporter

log = structlog.get_logger()


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
        self._send_traces()

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

    def _send_traces(self) -> None:
        """What cannot be done is a warning: these variables are often set for a whole host or cluster."""
        try:
            exporter = make_exporter(os.environ)
        except TracesError as error:
            log.warning("no traces are sent", cause=str(error))
            return
        if exporter is not None:
            from unslothd_server.traces import CallTracer

            self._tracer = CallTracer(exporter)
            self.observers.append(self._tracer)
            log.info("traces", exporter=wanted_exporter(os.environ))

    async def close(self) -> None:
        """Stops serving, and sends the spans that are left."""
        if self._endpoint is not None:
            await asyncio.to_thread(self._endpoint.close)
        if self._tracer is not None:
            await asyncio.to_thread(self._tracer.close)
