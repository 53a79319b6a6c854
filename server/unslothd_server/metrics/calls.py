"""Counts calls and measures how long they take, as they happen."""

from collections.abc import Generator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from unslothd_server.access.audit import CallRecord
from unslothd_server.access.scopes import SCOPES
from unslothd_server.rpc.observers import Metadata

# Seconds. Calls that read answer in milliseconds, loads and uploads in minutes; streams last as long as what they show.
_BUCKETS = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 5, 10, 60, 600, 3600)


class CallMetrics:
    """Observes calls (`rpc.observers.CallObserver`); labels are RPCs and gRPC codes, nothing that callers choose.

    Args:
        registry: Where the metrics are.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self._ended = Counter("unslothd_rpcs", "Calls that ended.", ("rpc", "code"), registry=registry)
        for rpc in SCOPES:
            self._ended.labels(rpc, "INTERNAL")  # from 0 on: Prometheus sees no increase where there was nothing before
        self._seconds = Histogram(
            "unslothd_rpc_duration_seconds",
            "How long calls took, streams until their end.",
            ("rpc",),
            buckets=_BUCKETS,
            registry=registry,
        )
        self._open = Gauge("unslothd_rpcs_in_progress", "Calls that are under way.", ("rpc",), registry=registry)

    @contextmanager
    def __call__(self, record: CallRecord, metadata: Metadata) -> Generator[None]:
        """Counts one call."""
        with self._open.labels(record.rpc).track_inprogress():
            yield
        self._ended.labels(record.rpc, record.code).inc()
        self._seconds.labels(record.rpc).observe(record.ms / 1000)
