"""The words of a scripted server's script, as the cases write them (README.md), made into handlers."""

import threading
from collections.abc import Iterator
from typing import Any

import grpc
from google.protobuf.json_format import ParseDict
from google.protobuf.message import Message

from support.scripted_server import TRAINING, Handler, Say
from unslothd.v1 import service_pb2, training_event_pb2

# A field that no server of today sends: kind number 99 of the events, an empty message.
_KIND_OF_THE_FUTURE = bytes([0x9A, 0x06, 0x00])


def handler(method: str, turn: list[Any]) -> Handler:
    """Returns what one call of a method does: one word after the other."""
    descriptor = service_pb2.DESCRIPTOR.services_by_name["UnslothService"].methods_by_name[method]
    response = getattr(service_pb2, descriptor.output_type.name)

    def stream(request: Message, context: grpc.ServicerContext) -> Iterator[Message]:
        for word in turn:
            yield from _spoken(word, response, request, context)

    def unary(request: Message, context: grpc.ServicerContext) -> Message | None:
        return next(stream(request, context), None)

    return stream if descriptor.server_streaming else unary


def _spoken(word: Any, response: Any, request: Message, context: grpc.ServicerContext) -> Iterator[Message]:
    match word:
        case int():
            yield response(event=Say.event(word))
        case "heartbeat":
            yield response(event=Say.heartbeat())
        case "lose":
            Say.lose()(request, context)
        case "hang":
            _hang(context)
        case {"lose": code}:
            Say.lose(grpc.StatusCode[code])(request, context)
        case {"succeeded": sequence}:
            yield response(event=Say.succeeded(sequence))
        case {"cancelled": sequence}:
            yield response(event=Say.event(sequence, cancelled=training_event_pb2.TrainingCancelled(step=sequence)))
        case {"failed": sequence, **refusal}:
            retry_ms = int(refusal.get("retry_after", 0) * 1000)
            status = Say.status(grpc.StatusCode[refusal["code"]], refusal["reason"], "no", retry_ms=retry_ms)
            yield response(event=Say.event(sequence, failed=training_event_pb2.TrainingFailed(error=status)))
        case {"unknown": sequence}:
            known = training_event_pb2.TrainingEvent(sequence=sequence, training_id=TRAINING)
            event = training_event_pb2.TrainingEvent.FromString(known.SerializeToString() + _KIND_OF_THE_FUTURE)
            yield response(event=event)
        case {"refuse": refusal}:
            fields, retry_ms = refusal.get("fields", {}), int(refusal.get("retry_after", 0) * 1000)
            code = grpc.StatusCode[refusal["code"]]
            Say.refuse(code, refusal["reason"], "no", retry_ms=retry_ms, **fields)(request, context)
        case {"send": message}:
            yield ParseDict(message, response())
        case _:
            raise ValueError(f"the script has no word {word!r}")


def _hang(context: grpc.ServicerContext) -> None:
    gone = threading.Event()
    if context.add_callback(gone.set):
        gone.wait(60)
