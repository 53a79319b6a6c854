"""Serves a registry over HTTP: GET /metrics and nothing else."""

import socket
import threading
from collections.abc import Callable, Iterable
from typing import Any, cast
from wsgiref.simple_server import WSGIRequestHandler, make_server

import prometheus_client
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import ThreadingWSGIServer

from unslothd_server.config import split_address

_App = Callable[..., Iterable[bytes]]
_PATH = "/metrics"
_POLL_SECONDS = 0.1


class MetricsEndpoint:
    """Listens from the start until `close`, in threads of its own.

    Args:
        registry: What is served.
        address: HOST:PORT; port 0 takes a free one.

    Raises:
        OSError: The address cannot be taken.
    """

    def __init__(self, registry: CollectorRegistry, address: str) -> None:
        host, port = split_address(address)
        server_class = type("Server", (ThreadingWSGIServer,), {"address_family": _family(host, port)})
        try:
            self._server = make_server(host, port, _only_metrics(registry), server_class, _Handler)
        except OSError as error:
            raise OSError(f"cannot serve metrics on {address}: {error}") from error
        self.address = f"{address.rpartition(':')[0]}:{self._server.server_port}"
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(_POLL_SECONDS,), name="metrics", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Stops listening; blocks for a moment."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Handler(WSGIRequestHandler):
    """Says nothing, and drops who connects and sends nothing."""

    timeout = 10

    def log_message(self, format: str, *args: Any) -> None:
        pass


def _family(host: str, port: int) -> socket.AddressFamily:
    return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][0]


def _only_metrics(registry: CollectorRegistry) -> _App:
    metrics: _App = cast(Any, prometheus_client).make_wsgi_app(registry)

    def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        if environ["PATH_INFO"] == _PATH:
            return metrics(environ, start_response)
        start_response("404 Not Found", [("Content-Type", "text/plain")])
        return [f"Metrics are at {_PATH}.\n".encode()]

    return app
