"""The gRPC server: our service, health and reflection on one port."""

from collections.abc import Sequence
from typing import Any, cast

import grpc
import grpc.aio
from google.protobuf import descriptor_pool
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from unslothd.v1 import service_pb2
from unslothd.v1.service_pb2_grpc import add_UnslothServiceServicer_to_server
from unslothd_server.access.audit import AuditLog
from unslothd_server.access.certificates import ServedCertificate, TlsContent
from unslothd_server.access.limits import CallLimits
from unslothd_server.app.service import Service
from unslothd_server.rpc.gate import Gate
from unslothd_server.rpc.intake import Intake
from unslothd_server.rpc.interceptor import ContractInterceptor
from unslothd_server.rpc.observers import CallObserver
from unslothd_server.rpc.reflection import ReflectedPool
from unslothd_server.rpc.servicer import UnslothServicer

_SERVICE = service_pb2.DESCRIPTOR.services_by_name["UnslothService"]
SERVICE_NAME = _SERVICE.full_name

# gRPC refuses messages beyond this before they are read; below it our own limit answers with details.
_TRANSPORT_LIMIT_BYTES = 64 * 1024 * 1024
_HANDSHAKE_SECONDS = 10.0  # who connects and says nothing is dropped then, at the latest
_OPTIONS = (
    ("grpc.max_receive_message_length", _TRANSPORT_LIMIT_BYTES),
    ("grpc.max_send_message_length", _TRANSPORT_LIMIT_BYTES),
    ("grpc.so_reuseport", 0),  # a second server on the same port is an error, not a lottery
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
)


def _keepalive(seconds: float) -> tuple[tuple[str, int], ...]:
    """An end that is silent for so long is asked whether it is there, and dropped without an answer in half of it."""
    ask, wait = int(seconds * 1000), int(seconds * 500)
    return (
        ("grpc.server_handshake_timeout_ms", int(min(seconds, _HANDSHAKE_SECONDS) * 1000)),
        ("grpc.keepalive_time_ms", ask),
        ("grpc.keepalive_timeout_ms", wait),
        ("grpc.http2.ping_timeout_ms", wait),  # else the answer to the same ping may take a minute
    )


class RpcServer:
    """Serves a Service.

    Args:
        service: What does the work.
        gate: Lets calls in.
        limits: What calls may hold.
        audit: Has a line for every call.
        keepalive_seconds: After how much silence a connection is asked whether it still is one.
        observers: Whoever else wants to know of every call.
    """

    def __init__(
        self,
        service: Service,
        gate: Gate,
        limits: CallLimits,
        audit: AuditLog,
        *,
        keepalive_seconds: float,
        observers: Sequence[CallObserver] = (),
    ) -> None:
        interceptor = ContractInterceptor(_SERVICE, gate, Intake(limits), audit, observers)
        self._server = grpc.aio.server(options=(*_OPTIONS, *_keepalive(keepalive_seconds)), interceptors=[interceptor])
        self._health: Any = cast(Any, health).aio.HealthServicer()  # types-grpcio does not know `aio`
        add_UnslothServiceServicer_to_server(UnslothServicer(service, limits), self._server)
        cast(Any, health_pb2_grpc).add_HealthServicer_to_server(self._health, self._server)
        names = (SERVICE_NAME, health.SERVICE_NAME, reflection.SERVICE_NAME)
        pool = ReflectedPool(descriptor_pool.Default())
        cast(Any, reflection).enable_server_reflection(names, self._server, pool=pool)  # it takes what acts as a pool

    async def start(self, address: str, certificate: ServedCertificate | None = None) -> int:
        """Listens on HOST:PORT; returns the port. Raises OSError when the address cannot be taken.

        Args:
            address: HOST:PORT; port 0 takes a free one.
            certificate: Serve with TLS; None = without.
        """
        try:
            if certificate is None:
                port = self._server.add_insecure_port(address)
            else:
                port = self._server.add_secure_port(address, _credentials(certificate))
        except RuntimeError as error:
            raise OSError(f"cannot listen on {address}: {error}") from error
        await self._server.start()
        for name in ("", SERVICE_NAME):
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        return port

    async def announce_stop(self) -> None:
        """Health answers NOT_SERVING from now on."""
        await self._health.enter_graceful_shutdown()

    async def stop(self, grace_seconds: float) -> None:
        """Takes no new call and ends those that are under way, by force after `grace_seconds`."""
        await self._server.stop(grace_seconds)


def _credentials(certificate: ServedCertificate) -> grpc.ServerCredentials:
    """Asks the certificate at every handshake whether it has changed; connections that are open go on as they are."""

    def changed() -> grpc.ServerCertificateConfiguration | None:
        content = certificate.changed()
        return None if content is None else _configuration(content)

    return grpc.dynamic_ssl_server_credentials(
        _configuration(certificate.content),
        cast(Any, changed),  # None means no change, which types-grpcio does not know
        require_client_authentication=certificate.content.client_ca is not None,
    )


def _configuration(content: TlsContent) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration([(content.key, content.cert)], content.client_ca)
