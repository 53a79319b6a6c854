"""Carries out flows (`_flows.py`): `SyncDriver` over grpc.Channel, `AsyncDriver` over grpc.aio.Channel."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Generic, Self, cast

import grpc
from google.protobuf.message import Message

from unslothd import _operations, errors
from unslothd._operations import ItemT, ResultT
from unslothd._stream_reader import StreamReader
from unslothd.v1.service_pb2_grpc import UnslothServiceStub

Metadata = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Transport:
    """What a driver needs to make calls.

    Args:
        stub: Made on a grpc.Channel for `SyncDriver`, on a grpc.aio.Channel for `AsyncDriver`.
        target: HOST:PORT, for error texts.
        metadata: Sent with every call.
    """

    stub: UnslothServiceStub
    target: str
    metadata: Metadata = field(default=(), repr=False)  # it may hold a token

    def start(self, method: str, request: Message, timeout: float | None) -> Any:
        """Starts a call: a stream, an awaitable, or (unary, synchronous) the response itself."""
        call = cast(Callable[..., Any], getattr(self.stub, method))
        return call(request, timeout=timeout, metadata=self.metadata)

    def send(self, method: str, requests: "Iterable[Message] | AsyncIterator[Message]") -> Any:
        """Starts a call whose requests are a stream: a future (synchronous) or an awaitable."""
        call: Any = getattr(self.stub, method)
        start = getattr(call, "future", call)  # grpc.aio has no other way to start it
        return start(requests, metadata=self.metadata)

    def translated(self, error: grpc.RpcError) -> errors.UnslothdError:
        """Returns the client's exception for an error of grpc, which stays its cause."""
        translated = errors.from_rpc_error(error, self.target)
        translated.__cause__ = error
        return translated


class _Driver(Generic[ItemT, ResultT]):
    """The state of one flow: what to send back next, and its one open stream."""

    def __init__(self, flow: _operations.Flow[ItemT, ResultT], transport: Transport) -> None:
        self._flow = flow
        self._transport = transport
        self._reply: Any = None
        self._error: errors.UnslothdError | OSError | None = None
        self._stream: Any = None
        self._result: ResultT | None = None
        self._finished = False
        self._failure: BaseException | None = None

    @property
    def result(self) -> ResultT:
        """What the flow returned; raises what it raised."""
        if self._failure is not None:
            raise self._failure
        if not self._finished:
            raise RuntimeError("not read to its end yet")
        return cast(ResultT, self._result)

    @property
    def finished(self) -> bool:
        """True once the flow has returned."""
        return self._finished

    def _step(self) -> _operations.Operation | _operations.Emit[ItemT] | None:
        """Resumes the flow with the last outcome; returns its next operation, or None when it has ended."""
        if self._finished or self._failure is not None:
            return None
        reply, error = self._reply, self._error
        self._reply = self._error = None
        try:
            return self._flow.throw(error) if error is not None else self._flow.send(reply)
        except StopIteration as stop:
            self._cancel_stream()
            self._result, self._finished = stop.value, True
            return None
        except BaseException as failure:
            self._cancel_stream()
            self._failure = failure
            raise

    def _open(self, operation: _operations.OpenStream) -> None:
        self._cancel_stream()
        self._stream = self._transport.start(operation.method, operation.request, None)
        if self._failure is not None:  # closed in the meantime
            self._cancel_stream()

    def _cancel_stream(self) -> None:
        if self._stream is not None:
            self._stream.cancel()
            self._stream = None

    def close(self) -> None:
        """Ends the flow and its stream. What runs on the server goes on. Legal from any thread."""
        if not self._finished and self._failure is None:
            self._failure = RuntimeError("closed before its end")
        self._cancel_stream()


class SyncDriver(_Driver[ItemT, ResultT]):
    """Iterates over what a flow emits; blocks in between."""

    _reader: StreamReader | None = None
    _interrupted: _operations.Operation | None = None

    def __iter__(self) -> Iterator[ItemT]:
        return self

    def __next__(self) -> ItemT:
        while (operation := self._next_operation()) is not None:
            if isinstance(operation, _operations.Emit):
                return operation.item
            try:
                self._reply = self._perform(operation)
            except KeyboardInterrupt:
                # The stream goes on, and so may whoever reads it: with the same message.
                self._interrupted = operation if isinstance(operation, _operations.Next) else None
                raise
            except grpc.RpcError as error:
                self._error = self._transport.translated(error)
            except (errors.UnslothdError, OSError) as error:  # of a Blocking
                self._error = error
        raise StopIteration

    def run(self) -> ResultT:
        """Runs a flow that emits nothing of interest to its end and returns its result."""
        for _ in self:
            pass
        return self.result

    def _next_operation(self) -> _operations.Operation | _operations.Emit[ItemT] | None:
        interrupted, self._interrupted = self._interrupted, None
        return interrupted or self._step()

    def _perform(self, operation: _operations.Operation) -> Any:
        match operation:
            case _operations.Unary():
                return self._transport.start(operation.method, operation.request, operation.timeout)
            case _operations.SendStream():
                return _response_of(self._transport.send(operation.method, iter(operation.requests)))
            case _operations.OpenStream():
                return self._open(operation)
            case _operations.Next():
                return self._next_message()
            case _operations.CloseStream():
                self._cancel_stream()
            case _operations.Sleep():
                time.sleep(operation.seconds)
            case _operations.Blocking():
                return operation.call()
        return None

    def _next_message(self) -> Any:
        stream = self._stream
        if stream is None:  # after close() in another thread
            return None
        reader = self._reader
        if reader is None:
            if threading.current_thread() is not threading.main_thread():
                return next(stream, None)
            reader = self._reader = StreamReader(stream)
        return reader.next()

    def _cancel_stream(self) -> None:
        super()._cancel_stream()
        self._reader = None


def _response_of(call: Any) -> Any:
    try:
        return call.result()
    except BaseException:  # Ctrl-C included: an upload does not go on behind the user's back
        call.cancel()
        raise


async def _made_in_a_thread(requests: Iterable[Message]) -> AsyncIterator[Message]:
    iterator = iter(requests)
    while (request := await asyncio.to_thread(next, iterator, None)) is not None:
        yield request


class AsyncDriver(_Driver[ItemT, ResultT]):
    """Iterates over what a flow emits; awaits in between."""

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> ItemT:
        while (operation := self._step()) is not None:
            if isinstance(operation, _operations.Emit):
                return operation.item
            try:
                self._reply = await self._perform(operation)
            except grpc.RpcError as error:
                self._error = self._transport.translated(error)
            except (errors.UnslothdError, OSError) as error:  # of a Blocking
                self._error = error
        raise StopAsyncIteration

    async def run(self) -> ResultT:
        """Runs a flow that emits nothing of interest to its end and returns its result."""
        async for _ in self:
            pass
        return self.result

    async def _perform(self, operation: _operations.Operation) -> Any:
        match operation:
            case _operations.Unary():
                call: Awaitable[Any] = self._transport.start(operation.method, operation.request, operation.timeout)
                return await call
            case _operations.SendStream():
                return await self._transport.send(operation.method, _made_in_a_thread(operation.requests))
            case _operations.OpenStream():
                return self._open(operation)
            case _operations.Next():
                stream = self._stream
                message = grpc.aio.EOF if stream is None else await stream.read()
                return None if message is grpc.aio.EOF else message
            case _operations.CloseStream():
                self._cancel_stream()
            case _operations.Sleep():
                await asyncio.sleep(operation.seconds)
            case _operations.Blocking():
                return await asyncio.to_thread(operation.call)
        return None
