"""Protobuf messages as JSON that an agent reads without a schema: numbers as numbers, enums by their short names.

protobuf's own JSON writes 64-bit integers as strings and enums with their prefix.
"""

import datetime
import math
from typing import Any, TypeAlias, cast

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp
from google.rpc.status_pb2 import Status

from unslothd import errors

Plain: TypeAlias = dict[str, Any]


def plain(message: Message) -> Plain:
    """Returns the fields of a message: those that are set, and numbers, texts and flags that are always there.

    Bytes are left out. A number that is not finite becomes its name: "nan", "inf" or "-inf".
    """
    result: Plain = {}
    for field in cast(list[Any], message.DESCRIPTOR.fields):
        if field.type == FieldDescriptor.TYPE_BYTES or (field.has_presence and not message.HasField(field.name)):
            continue
        value = getattr(message, field.name)
        if field.is_repeated:
            if len(value):
                result[field.name] = _many(field, value)
        else:
            result[field.name] = _one(field, value)
    return result


def moment(time: Timestamp) -> str:
    """Returns a time in UTC: "2026-11-24T12:00:00Z"."""
    return time.ToDatetime(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def status(value: Status) -> Plain:
    """Returns an error that a message carries, as the results of failed calls show theirs."""
    error = errors.from_status(value)
    return {"code": error.code.name, "reason": error.reason, "message": error.message, **error.metadata}


def _many(field: Any, value: Any) -> Any:
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        return dict(value)
    return [_one(field, each) for each in value]


def _one(field: Any, value: Any) -> Any:
    match value:
        case Timestamp():
            return moment(value)
        case Status():
            return status(value)
        case Message():
            return plain(value)
        case int() if field.enum_type is not None:
            return short_name(field.enum_type, value)
        case float() if not math.isfinite(value):
            return str(value)
        case _:
            return value


def short_name(enum_type: Any, number: int) -> str:
    """Returns the name of an enum value as tools take it: STATE_RUNNING is "running"."""
    prefix: str = enum_type.values_by_number[0].name.removesuffix("UNSPECIFIED")
    value = enum_type.values_by_number.get(number)
    return value.name.removeprefix(prefix).lower() if value is not None else str(number)
