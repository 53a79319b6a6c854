"""What both clients are made of: settings, channel options, and the flow behind each method."""

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

import grpc
from google.protobuf.message import Message

from unslothd import _connection, _datasets, _flows, _operations, _requests, _upload, errors
from unslothd._connection import Pem
from unslothd._datasets import DatasetLike
from unslothd._drive import Metadata
from unslothd._retry import Peer, Retry
from unslothd._upload_sources import FormatName
from unslothd.v1 import dataset_pb2, model_pb2, service_pb2

DEFAULT_TIMEOUT = 60.0
DEFAULT_RECONNECT_TIMEOUT = 120.0
# Attaching an adapter to a large model, and ending a worker, take longer than a look-up.
_SLOW_TIMEOUT = 600.0

_CHANNEL_OPTIONS: dict[str, int] = {
    # Notices a dead peer within 40 s, also while the server is silent.
    "grpc.keepalive_time_ms": 30_000,
    "grpc.keepalive_timeout_ms": 10_000,
    "grpc.http2.ping_timeout_ms": 10_000,  # else the answer to the same ping may take a minute
    "grpc.http2.max_pings_without_data": 0,
    # gRPC waits up to 2 minutes between its own attempts to connect; calls fail at once in the meantime.
    "grpc.initial_reconnect_backoff_ms": 100,
    "grpc.min_reconnect_backoff_ms": 1_000,
    "grpc.max_reconnect_backoff_ms": 2_000,
    # A client of its own: another client's failed attempts do not delay this one.
    "grpc.use_local_subchannel_pool": 1,
    "grpc.max_send_message_length": -1,
    "grpc.max_receive_message_length": 64 * 1024 * 1024,
}


class BaseClient:
    """Settings of a client, and the flows that its methods run.

    Where, how and as whom it connects comes from the argument, else the environment variable, else the profile, else
    the default. An argument that is None is not given. docs/connecting.md has it all.

    Args:
        target: HOST:PORT of the server; UNSLOTHD_TARGET; default 127.0.0.1:50051.
        token: Sent as "authorization: Bearer …" with every call; UNSLOTHD_TOKEN. Never sent over a plain connection to
            another host.
        token_file: File with the token instead; UNSLOTHD_TOKEN_FILE.
        ca: Certificates of the authority that signed the server's, as a PEM file or its bytes; UNSLOTHD_CA. Turns TLS
            on.
        client_certificate: Shown to the server, as a PEM file or its bytes; UNSLOTHD_CLIENT_CERT. Turns TLS on.
        client_key: Its private key; UNSLOTHD_CLIENT_KEY.
        tls: True = TLS that trusts the public authorities, where there is no `ca`; UNSLOTHD_TLS.
        profile: Name of a profile in ~/.config/unslothd/config.toml; UNSLOTHD_PROFILE; by default the one that is
            called "default", where no target is given.
        credentials: gRPC's own, in place of ca, client_certificate, client_key and tls.
        metadata: More headers for every call.
        timeout: Seconds for one call that is not a stream; prepare and unload_model have at least ten minutes.
        reconnect_timeout: Seconds without progress after which a lost connection is given up. A server that has never
            answered is given up sooner.
        options: More gRPC channel options; they win over the client's own.

    Raises:
        ValueError: The settings cannot be used; the text has a line for each problem.
    """

    def __init__(
        self,
        target: str | None = None,
        *,
        token: str | None = None,
        token_file: str | PathLike[str] | None = None,
        ca: Pem | None = None,
        client_certificate: Pem | None = None,
        client_key: Pem | None = None,
        tls: bool | None = None,
        profile: str | None = None,
        credentials: grpc.ChannelCredentials | None = None,
        metadata: Mapping[str, str] | None = None,
        timeout: float = DEFAULT_TIMEOUT,
        reconnect_timeout: float = DEFAULT_RECONNECT_TIMEOUT,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        connection = _connection.resolve(
            {
                "target": target,
                "token": token,
                "token_file": token_file,
                "ca": ca,
                "client_certificate": client_certificate,
                "client_key": client_key,
                "tls": tls,
                "profile": profile,
            },
            credentials=credentials,
            metadata=metadata,
        )
        self.target = connection.target
        self._exposed = connection.exposed
        self.timeout = timeout
        self.reconnect_timeout = reconnect_timeout
        self._credentials = connection.credentials
        self._metadata: Metadata = tuple(connection.headers.items())
        self._options: list[tuple[str, Any]] = list(
            {**_CHANNEL_OPTIONS, **connection.options, **(options or {})}.items()
        )
        self._peer = Peer()

    def _stream_retry(self) -> Retry:
        return Retry(self._peer, self.reconnect_timeout)

    def _unary_retry(self) -> Retry:
        return Retry(self._peer, min(self.timeout, self.reconnect_timeout), first_contact=0.0)

    def _unary_flow(
        self, method: str, request: Message, *, slow: bool = False, repeatable: bool = True
    ) -> _operations.Flow[Any, Any]:
        timeout = max(self.timeout, _SLOW_TIMEOUT) if slow else self.timeout
        retry = self._unary_retry() if repeatable else Retry(self._peer, 0.0, first_contact=0.0)
        return _flows.unary(method, request, timeout, retry)

    def _load_flow(
        self, model_name: str, request_id: str | None, options: _requests.LoadOptions
    ) -> _operations.Flow[model_pb2.LoadProgress, model_pb2.Model]:
        request = _requests.load_model(model_name, request_id, options)
        if request.token and self._exposed:
            raise errors.hub_token_in_plain_text(_connection.in_plain_text("Hugging Face token", self.target))
        return _flows.load(request, self._stream_retry())

    def _upload_flow(
        self,
        data: DatasetLike,
        name: str,
        data_format: FormatName | None,
        on_progress: _upload.OnProgress | None,
    ) -> _operations.Flow[Any, dataset_pb2.Dataset]:
        source = yield _operations.Blocking(lambda: _datasets.upload_source(data, data_format))
        return (yield from _upload.upload(source, name, self.timeout, self._stream_retry(), on_progress))

    def _placed_flow(
        self, train: DatasetLike, evaluation: DatasetLike | None
    ) -> _operations.Flow[Any, tuple[DatasetLike, DatasetLike | None]]:
        """Uploads what is too large for a request; returns both, as a request can carry them."""
        placed = yield from self._place(train)
        return placed, None if evaluation is None else (yield from self._place(evaluation))

    def _place(self, data: DatasetLike) -> _operations.Flow[Any, DatasetLike]:
        placed = yield _operations.Blocking(lambda: _datasets.place(data))
        if isinstance(placed, dataset_pb2.DatasetSource):
            return placed
        return (yield from _upload.upload(placed, "", self.timeout, self._stream_retry(), None))

    def _list_datasets_flow(self, limit: int | None) -> _operations.Flow[Any, list[dataset_pb2.Dataset]]:
        request = service_pb2.ListDatasetsRequest(page_size=min(limit or 1000, 1000))
        return _flows.list_datasets(request, limit, self.timeout, self._unary_retry())

    def _train_flow(
        self, request: service_pb2.TrainRequest, cursor: _flows.Cursor
    ) -> _operations.Flow[Any, _flows.Outcome]:
        return _flows.train(request, cursor, self._stream_retry())

    def _watch_flow(self, cursor: _flows.Cursor) -> _operations.Flow[Any, _flows.Outcome]:
        return _flows.watch(cursor, self._stream_retry(), self.timeout)

    def _resume_flow(
        self, training: _requests.TrainingLike, checkpoint_step: int
    ) -> _operations.Flow[Any, _flows.Cursor]:
        request = service_pb2.ResumeTrainingRequest(
            training_id=_requests.training_id(training), checkpoint_step=checkpoint_step
        )
        return _flows.resume(request, self.timeout, self._unary_retry())

    def _list_trainings_flow(
        self,
        model: _requests.ModelLike | None,
        states: Sequence[_requests.TrainingState],
        labels: Mapping[str, str] | None,
        limit: int | None,
    ) -> _operations.Flow[Any, Any]:
        request = _requests.list_trainings(model, states, labels, min(limit or 1000, 1000))
        return _flows.list_trainings(request, limit, self.timeout, self._unary_retry())
