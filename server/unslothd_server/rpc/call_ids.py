"""Which models, trainings, datasets and artifacts a message names, for the audit log."""

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from google.protobuf.descriptor import Descriptor
from google.protobuf.message import Message

ID_FIELDS = frozenset({"model_id", "training_id", "dataset_id", "artifact_id", "request_id"})


def ids_in(message: Message) -> dict[str, str]:
    """Returns the ids that a message or a message in it names, e.g. {"training_id": "…"}; those outside come first."""
    found: dict[str, str] = {}
    for path in _paths(message.DESCRIPTOR):
        inner: Any = message
        for name in path[:-1]:
            inner = getattr(inner, name)  # an unset one reads as empty
        value = getattr(inner, path[-1])
        if value:
            found.setdefault(path[-1], value)
    return found


@lru_cache
def _paths(descriptor: Descriptor) -> tuple[tuple[str, ...], ...]:
    """Where the ids are, worked out once a type: in the message itself, or one message deeper."""
    return tuple(sorted(_walk(descriptor, 1), key=len))


def _walk(descriptor: Descriptor, deeper: int) -> Iterator[tuple[str, ...]]:
    for field in descriptor.fields:
        if field.is_repeated:
            continue
        if field.name in ID_FIELDS:
            yield (field.name,)
        elif field.message_type is not None and deeper:
            for rest in _walk(field.message_type, deeper - 1):
                yield (field.name, *rest)
