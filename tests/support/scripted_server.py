"""A server that answers from a script, so that tests choose where a stream breaks."""

import threading
from collections.abc import Callable, Iterator
from concurrent import futures

import grpc
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status

from unslothd.v1 import service_pb2, training_event_pb2, training_pb2
from unslothd.v1.service_pb2_grpc import UnslothServiceServicer, add_UnslothServiceServicer_to_server

Handler = Callable[[Message, grpc.ServicerContext], object]
TRAINING = "training-20261124-120000-abcdef"


class Script(UnslothServiceServicer):
    """Answers the n-th call of a method with the n-th handler scripted for it, and keeps every request."""

    def __init__(self) -> None:
        self.handlers: dict[str, list[Handler]] = {}
        self.requests: list[tuple[str, Message]] = []
        self.metadata: list[dict[str, str | bytes]] = []
        self._lock = threading.Lock()

    def on(self, method: str, *handlers: Handler) -> None:
        self.handlers.setdefault(method, []).extend(handlers)

    def calls(self, method: str) -> list[Message]:
        return [request for name, request in self.requests if name == method]

    def _next(self, method: str, request: Message, context: grpc.ServicerContext) -> object:
        with self._lock:
            self.requests.append((method, request))
            self.metadata.append(dict(context.invocation_metadata()))
            waiting = self.handlers.get(method)
            handler = waiting.pop(0) if waiting else None
        if handler is None:
            context.abort(grpc.StatusCode.UNIMPLEMENTED, f"no handler is scripted for this call of {method}")
        return handler(request, context)


def _unary(method: str) -> Callable[..., object]:
    return lambda self, request, context: self._next(method, request, context)


def _stream(method: str) -> Callable[..., Iterator[object]]:
    def serve(self: Script, request: Message, context: grpc.ServicerContext) -> Iterator[object]:
        yield from self._next(method, request, context)

    return serve


for _method in service_pb2.DESCRIPTOR.services_by_name["UnslothService"].methods:
    if not _method.client_streaming:
        setattr(Script, _method.name, (_stream if _method.server_streaming else _unary)(_method.name))


class ScriptedServer:
    """The script behind a port; it can be stopped as by a crash and started again on the same port.

    Args:
        credentials: For TLS; None = plain text.
    """

    def __init__(self, credentials: grpc.ServerCredentials | None = None) -> None:
        self.script = Script()
        self._credentials = credentials
        self.port = 0
        self.start()

    @property
    def target(self) -> str:
        return f"127.0.0.1:{self.port}"

    def start(self) -> None:
        self._server = grpc.server(futures.ThreadPoolExecutor(max_workers=8), options=[("grpc.so_reuseport", 0)])
        add_UnslothServiceServicer_to_server(self.script, self._server)
        address = f"127.0.0.1:{self.port}"
        if self._credentials is None:
            self.port = self._server.add_insecure_port(address)
        else:
            self.port = self._server.add_secure_port(address, self._credentials)
        assert self.port
        self._server.start()

    def stop(self) -> None:
        self._server.stop(grace=None).wait(10)


class Say:
    """Words of the script."""

    TRAINING = TRAINING

    @staticmethod
    def event(sequence: int, **kind: Message) -> training_event_pb2.TrainingEvent:
        if not kind:
            kind = {"step": training_event_pb2.StepProgress(step=sequence, total_steps=5, loss=1.0 / max(sequence, 1))}
        return training_event_pb2.TrainingEvent(sequence=sequence, training_id=TRAINING, **kind)

    @classmethod
    def succeeded(cls, sequence: int) -> training_event_pb2.TrainingEvent:
        metrics = training_pb2.TrainingMetrics(train_loss=0.5, train_tokens=10)
        done = training_event_pb2.TrainingSucceeded(metrics=metrics, output_dir="/out/final")
        return cls.event(sequence, succeeded=done)

    @classmethod
    def heartbeat(cls) -> training_event_pb2.TrainingEvent:
        return cls.event(0, heartbeat=training_event_pb2.Heartbeat(state=training_pb2.Training.STATE_RUNNING))

    @staticmethod
    def events(*events: training_event_pb2.TrainingEvent | int, then: Handler | None = None) -> Handler:
        """Sends events (or step events by their sequences), then ends the stream or does what `then` says."""

        def serve(request: Message, context: grpc.ServicerContext) -> Iterator[Message]:
            watching = isinstance(request, service_pb2.WatchTrainingRequest)
            response = service_pb2.WatchTrainingResponse if watching else service_pb2.TrainResponse
            for event in events:
                yield response(event=Say.event(event) if isinstance(event, int) else event)
            if then is not None:
                then(request, context)

        return serve

    @staticmethod
    def messages(*messages: Message, then: Handler | None = None) -> Handler:
        def serve(request: Message, context: grpc.ServicerContext) -> Iterator[Message]:
            yield from messages
            if then is not None:
                then(request, context)

        return serve

    @staticmethod
    def answer(message: Message) -> Handler:
        return lambda _request, _context: message

    @staticmethod
    def lose(code: grpc.StatusCode = grpc.StatusCode.UNAVAILABLE) -> Handler:
        """Ends the call as a broken connection does: with a code and nothing of the server's own."""
        return lambda _request, context: context.abort(code, "Socket closed")

    @staticmethod
    def status(code: grpc.StatusCode, reason: str, message: str, *, retry_ms: int = 0, **fields: str) -> Status:
        details: list[Message] = [ErrorInfo(reason=reason, domain="unslothd", metadata={"hint": "7"})]
        violations = [BadRequest.FieldViolation(field=name, description=text) for name, text in fields.items()]
        if violations:
            details.append(BadRequest(field_violations=violations))
        if retry_ms:
            details.append(RetryInfo(retry_delay=Duration(seconds=retry_ms // 1000, nanos=retry_ms % 1000 * 1_000_000)))
        status = Status(code=code.value[0], message=message)
        for detail in details:
            status.details.add().Pack(detail)
        return status

    @classmethod
    def refuse(
        cls, code: grpc.StatusCode, reason: str, message: str = "no", *, retry_ms: int = 0, **fields: str
    ) -> Handler:
        """Ends the call with an error of the server's own."""
        status = cls.status(code, reason, message, retry_ms=retry_ms, **fields)

        def serve(_request: Message, context: grpc.ServicerContext) -> None:
            context.set_trailing_metadata((("grpc-status-details-bin", status.SerializeToString()),))
            context.abort(code, message)

        return serve
