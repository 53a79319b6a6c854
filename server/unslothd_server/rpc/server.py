"""The gRPC server: our service, health and reflection on one port."""

from typing import Any, cast

import grpc.aio
from google.protobuf import descriptor_pool
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from unslothd.v1 import service_pb2
from unslothd.v1.service_pb2_grpc import add_UnslothServiceServicer_to_server
from unslothd_server.app.service import Service
from unslothd_server.rpc.interceptor import ContractInterceptor
from unslothd_server.rpc.reflection import ReflectedPool
from unslothd_server.rpc.servicer import UnslothServicer

SERVICE_NAME = service_pb2.DESCRIPTOR.services_by_name["UnslothService"].full_name

# gRPC refuses messages beyond this before they are read; below it our own limit answers with details.
_TRANSPORT_LIMIT_BYTES = 64 * 1024 * 1024
_OPTIONS = (
    ("grpc.max_receive_message_length", _TRANSPORT_LIMIT_BYTES),
    ("grpc.max_send_message_length", _TRANSPORT_LIMIT_BYTES),
    ("grpc.so_reuseport", 0),  # a second server on the same port is an error, not a lottery
    # A watcher whose host vanished is dropped within 30 seconds.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.ping_timeout_ms", 10_000),  # else the answer to the same ping may take a minute
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
)


class RpcServer:
    """Serves a Service.

    Args:
        service: What does the work.
        max_message_bytes: Largest request.
    """

    def __init__(self, service: Service, max_message_bytes: int) -> None:
        interceptor = ContractInterceptor(SERVICE_NAME, max_message_bytes)
        self._server = grpc.aio.server(options=_OPTIONS, interceptors=[interceptor])
        self._health: Any = cast(Any, health).aio.HealthServicer()  # types-grpcio does not know `aio`
        add_UnslothServiceServicer_to_server(UnslothServicer(service), self._server)
        cast(Any, health_pb2_grpc).add_HealthServicer_to_server(self._health, self._server)
        names = (SERVICE_NAME, health.SERVICE_NAME, reflection.SERVICE_NAME)
        pool = ReflectedPool(descriptor_pool.Default())
        cast(Any, reflection).enable_server_reflection(names, self._server, pool=pool)  # it takes what acts as a pool

    async def start(self, address: str) -> int:
        """Listens on HOST:PORT; returns the port. Raises OSError when the address cannot be taken."""
        try:
            port = self._server.add_insecure_port(address)
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
