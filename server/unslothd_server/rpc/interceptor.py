"""What every call passes through: who calls, its request, errors as statuses, and its lines in the logs."""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import ExitStack, asynccontextmanager
from typing import Any, TypeAlias
from urllib.parse import unquote

import grpc
import grpc.aio
import structlog
from google.protobuf.descriptor import ServiceDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from grpc_status import rpc_status
from structlog.contextvars import bind_contextvars

from unslothd.v1.server_info_pb2 import Scope
from unslothd_server.access.audit import AuditLog, CallRecord
from unslothd_server.access.callers import CURRENT
from unslothd_server.access.scopes import READ, SCOPES
from unslothd_server.errors import UnexpectedError, UnslothdError
from unslothd_server.rpc.call_ids import ids_in
from unslothd_server.rpc.gate import Context, Gate
from unslothd_server.rpc.intake import Intake
from unslothd_server.rpc.observers import CallObserver
from unslothd_server.status import fit_to_send, to_status

log = structlog.get_logger()

Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
_REFLECTION = "grpc.reflection."
# Trailing metadata of every call: what its lines in the logs are found by.
CALL_ID_KEY = "unslothd-call-id"


class ContractInterceptor(grpc.aio.ServerInterceptor):
    """Wraps the handlers of our own service and of reflection; health passes untouched.

    All our handlers take a stream of bytes, also for calls with one request: so nothing of a request is received, let
    alone parsed, before it is clear who calls and whether that caller may.

    Args:
        service: Our service.
        gate: Lets calls in.
        intake: Reads requests.
        audit: Has a line for every call.
        observers: Whoever else wants to know of every call.
    """

    def __init__(
        self,
        service: ServiceDescriptor,
        gate: Gate,
        intake: Intake,
        audit: AuditLog,
        observers: Sequence[CallObserver] = (),
    ) -> None:
        self._service = service
        self._gate = gate
        self._intake = intake
        self._audit = audit
        self._observers = observers

    async def intercept_service(  # pyright: ignore[reportIncompatibleMethodOverride] - the base leaves it untyped
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler:
        """Returns the handler of a call, wrapped."""
        handler = await continuation(handler_call_details)
        service, _, rpc = handler_call_details.method.removeprefix("/").rpartition("/")
        if handler is None:  # pyright: ignore[reportUnnecessaryComparison] - of a method that there is not
            return handler
        if service.startswith(_REFLECTION):
            return grpc.stream_stream_rpc_method_handler(
                self._reflection(handler), handler.request_deserializer, handler.response_serializer
            )
        if service != self._service.full_name:
            return handler
        if handler.response_streaming:
            return grpc.stream_stream_rpc_method_handler(
                self._streaming(rpc, handler), None, _serializer(handler.response_serializer)
            )
        return grpc.stream_unary_rpc_method_handler(self._unary(rpc, handler), None, handler.response_serializer)

    def _unary(self, rpc: str, handler: Any) -> Callable[..., Awaitable[Message]]:
        parse = handler.request_deserializer

        async def call(requests: AsyncIterator[bytes], context: Context) -> Message:
            async with self._call(rpc, SCOPES[rpc], context, stream=handler.request_streaming) as record:
                if handler.request_streaming:
                    self._audit.begun(record)
                    response = await handler.stream_unary(self._each(requests, parse, record), context)
                else:
                    request = await self._intake.one(requests, parse, exposed=self._gate.exposed(context))
                    _note_ids(record, request)
                    response = await handler.unary_unary(request, context)
                _note_ids(record, response)
                return response

        return call

    async def _each(self, requests: AsyncIterator[bytes], parse: Any, record: CallRecord) -> AsyncIterator[Message]:
        async for request in self._intake.each(requests, parse):
            self._gate.recheck(record.caller)
            yield request

    def _streaming(self, rpc: str, handler: Any) -> Callable[..., AsyncIterator[Any]]:
        response_class = GetMessageClass(self._service.methods_by_name[rpc].output_type)

        async def call(requests: AsyncIterator[bytes], context: Context) -> AsyncIterator[Any]:
            async with self._call(rpc, SCOPES[rpc], context, stream=True) as record:
                exposed = self._gate.exposed(context)
                request = await self._intake.one(requests, handler.request_deserializer, exposed=exposed)
                _note_ids(record, request)
                self._audit.begun(record)
                first = True
                async for response in handler.unary_stream(request, context):
                    self._gate.recheck(record.caller)
                    if isinstance(response, Message):
                        _note_ids(record, response)
                    elif first:  # all frames of a watch are of one training
                        _note_ids(record, response_class.FromString(response))
                    first = False
                    yield response

        return call

    def _reflection(self, handler: Any) -> Callable[..., AsyncIterator[Any]]:
        async def call(requests: AsyncIterator[Any], context: Context) -> AsyncIterator[Any]:
            async with self._call("ServerReflectionInfo", READ, context, stream=True):
                async for response in handler.stream_stream(requests, context):
                    yield response

        return call

    @asynccontextmanager
    async def _call(
        self, rpc: str, needed: "Scope.ValueType", context: Context, *, stream: bool
    ) -> AsyncGenerator[CallRecord]:
        """Lets a call in, ends it with the status of its error, and writes down how it went."""
        started = time.monotonic()
        record = CallRecord(rpc, unquote(context.peer()))
        call_id = ((CALL_ID_KEY, record.call_id),)
        context.set_trailing_metadata(call_id)
        bind_contextvars(call_id=record.call_id, rpc=rpc)
        observed = ExitStack()
        for observer in self._observers:
            observed.enter_context(observer(record, context.invocation_metadata() or ()))

        def over(code: str, reason: str = "") -> None:
            """Before the caller hears of it."""
            record.code, record.reason = code, reason
            record.ms = round((time.monotonic() - started) * 1000, 1)
            self._audit.ended(record)
            observed.close()
            tell = log.info if reason else log.debug
            tell("rpc", caller=record.caller.name, code=code, reason=reason, ms=record.ms)

        try:
            with self._gate.admit(record, needed, context, stream=stream):
                CURRENT.set(record.caller)
                bind_contextvars(caller=record.caller.name)
                yield record
        except (asyncio.CancelledError, GeneratorExit):
            over("DEADLINE_EXCEEDED" if context.time_remaining() == 0 else "CANCELLED")
            raise
        except Exception as error:  # noqa: BLE001 - whatever it is, it becomes a status
            known = _known(error, record.call_id)
            status: Any = rpc_status.to_status(fit_to_send(to_status(known)))  # pyright: ignore[reportUnknownMemberType]
            over(status.code.name, known.reason_name)
            await context.abort(status.code, status.details, (*status.trailing_metadata, *call_id))
        else:
            over("OK")


def _known(error: Exception, call_id: str) -> UnslothdError:
    if isinstance(error, UnslothdError):
        return error
    unexpected = UnexpectedError(call_id)
    log.error("unexpected error", error_id=unexpected.error_id, exc_info=error)
    return unexpected


def _note_ids(record: CallRecord, message: Message) -> None:
    """Keeps which ids a request or an answer names, for the audit log and all lines of the call."""
    found = ids_in(message)
    record.ids.update(found)
    bind_contextvars(**found)


def _serializer(inner: Any) -> Callable[[Message | bytes], bytes]:
    """Event frames are encoded once for all watchers and pass as they are."""

    def serialize(message: Message | bytes) -> bytes:
        return message if isinstance(message, bytes) else inner(message)

    return serialize
