"""Messages from descriptors: within the rules of protovalidate that the contract carries, or beyond one of them."""

import math
from random import Random
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from fuzz.words import ODD_TEXTS, Words
from unslothd._vendor.buf.validate import validate_pb2

_FLOATS = {FieldDescriptor.CPPTYPE_DOUBLE, FieldDescriptor.CPPTYPE_FLOAT}
_BOUNDS_OF_TYPE = {
    FieldDescriptor.CPPTYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.CPPTYPE_INT64: (-(2**63), 2**63 - 1),
    FieldDescriptor.CPPTYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.CPPTYPE_UINT64: (0, 2**64 - 1),
}
_USUAL_TEXT = 40
_USUAL_LIMIT = 4096
_RARELY = 0.004  # values as large as the rules allow cost time


class MessageMaker:
    """Makes requests.

    Args:
        random: Source of every choice.
        words: Values for fields that have a meaning.
        huge: Whether values may be as large, or larger, than a rule of more than some thousand bytes allows.
    """

    def __init__(self, random: Random, words: Words, *, huge: bool = True) -> None:
        self._random = random
        self._words = words
        self._huge = huge
        self._request = ""

    def request(self, descriptor: Descriptor, *, broken: bool) -> Message:
        """Makes a request. Broken: about every third field is beyond its rules, or missing; of few, one."""
        self._request = descriptor.name
        return self._message(descriptor, max(0.3, 0.9 / max(len(descriptor.fields), 1)) if broken else 0.0)

    def _message(self, descriptor: Descriptor, breakage: float) -> Message:
        message = GetMessageClass(descriptor)()
        chosen = {oneof.name: self._random.choice(oneof.fields).name for oneof in descriptor.oneofs}
        for field in descriptor.fields:
            oneof = field.containing_oneof
            real_oneof = oneof is not None and len(oneof.fields) > 1
            breaks = self._random.random() < breakage
            if real_oneof and chosen[oneof.name] != field.name:
                continue
            if not (real_oneof or _is_needed(field)) and self._random.random() < 0.6:
                continue
            if breaks and self._random.random() < 0.2:
                continue  # missing
            self._fill(message, field, breakage, breaks=breaks)
        return message

    def _fill(self, message: Message, field: FieldDescriptor, breakage: float, *, breaks: bool) -> None:
        if _is_map(field):
            self._fill_map(getattr(message, field.name), breaks=breaks)
        elif field.is_repeated:
            self._fill_repeated(message, field, breakage, breaks=breaks)
        elif field.message_type is not None:
            getattr(message, field.name).CopyFrom(self._message(field.message_type, breakage))
        else:
            setattr(message, field.name, self._value(field, _rules(field), breaks=breaks))

    def _fill_map(self, pairs: Any, *, breaks: bool) -> None:
        for _ in range(self._random.choice((0, 1, 3, 65)) if breaks else self._random.randint(0, 3)):
            key = self._text(0 if breaks else 1, 70 if breaks else 63)
            pairs[key] = self._text(0, 300 if breaks else 256)

    def _fill_repeated(self, message: Message, field: FieldDescriptor, breakage: float, *, breaks: bool) -> None:
        rules = _rules(field).repeated
        most = rules.max_items or 4
        count = (
            most + 1
            if breaks and self._random.random() < 0.1
            else self._random.randint(max(rules.min_items, 0 if breaks else 1), 3)
        )
        values = getattr(message, field.name)
        for _ in range(min(count, 2000)):
            if field.message_type is not None:
                values.append(self._message(field.message_type, breakage))
            else:
                value = self._value(field, rules.items, breaks=breaks)
                if breaks or not rules.unique or value not in values:
                    values.append(value)

    def _value(self, field: FieldDescriptor, rules: Any, *, breaks: bool) -> Any:
        if field.enum_type is not None:
            return self._enum(field, rules, breaks=breaks)
        if not breaks:
            word = self._words.of(self._request, field.name)
            if word is not None:
                return word
        if field.cpp_type in _BOUNDS_OF_TYPE:
            return self._integer(field, rules, breaks=breaks)
        if field.cpp_type in _FLOATS:
            return self._float(rules, breaks=breaks)
        if field.cpp_type == FieldDescriptor.CPPTYPE_BOOL:
            return self._random.random() < 0.5
        return self._text_of(field, rules, breaks=breaks)

    def _text_of(self, field: FieldDescriptor, rules: Any, *, breaks: bool) -> str | bytes:
        if field.type == FieldDescriptor.TYPE_BYTES:
            most = rules.bytes.max_len + 1 if self._huge else 0
            return self._random.randbytes(most if breaks else self._random.randint(1, 200))
        return self._string(rules.string, breaks=breaks)

    def _enum(self, field: FieldDescriptor, rules: Any, *, breaks: bool) -> int:
        if breaks:
            return self._random.choice((0, 99, -1, 2**31 - 1))
        return self._random.choice([v.number for v in field.enum_type.values if v.number not in rules.enum.not_in])

    def _integer(self, field: FieldDescriptor, rules: Any, *, breaks: bool) -> int:
        low, high = _BOUNDS_OF_TYPE[field.cpp_type]
        kind = rules.WhichOneof("type")
        bounds = getattr(rules, kind) if kind else None
        least = _bound(bounds, "gte", low)
        most = _bound(bounds, "lte", high)
        if breaks:
            return self._random.choice([max(low, least - 1), min(high, most + 1), low, high])
        if self._random.random() < 0.2:
            return self._random.choice((least, most))
        return self._random.randint(least, min(most, max(least, 0) + 100))

    def _float(self, rules: Any, *, breaks: bool) -> float:
        bounds = rules.double
        least, most = (
            _bound(bounds, "gte", _bound(bounds, "gt", -1e9)),
            _bound(bounds, "lte", _bound(bounds, "lt", 1e9)),
        )
        if breaks:
            return self._random.choice([math.nan, math.inf, -math.inf, least - 1, most * 1.001 + 1, 1e308, -0.0])
        return self._random.uniform(least, most) or 5e-324

    def _string(self, rules: Any, *, breaks: bool) -> str:
        choices = list(getattr(rules, "in"))
        most = rules.max_len or rules.max_bytes // 4 or 1000
        most = most if self._huge else min(most, _USUAL_LIMIT)
        if breaks:
            return self._random.choice((self._text(most + 1, most + 9), "", *ODD_TEXTS))
        if choices:
            return self._random.choice(choices)
        long = self._random.random() < _RARELY
        return self._text(most, most) if long else self._text(max(1, rules.min_len), min(most, _USUAL_TEXT))

    def _text(self, least: int, most: int) -> str:
        length = self._random.randint(least, most)
        plain = "".join(self._random.choices("abc XYZ_-./09", k=min(length, _USUAL_TEXT)))
        text = self._random.choice(ODD_TEXTS) + plain if self._random.random() < 0.2 else plain
        return (text + "é" * (length - len(text)))[:length]


def _rules(field: FieldDescriptor) -> Any:
    return field.GetOptions().Extensions[validate_pb2.field]


def _bound(bounds: Any, name: str, default: Any) -> Any:
    return getattr(bounds, name) if bounds is not None and bounds.HasField(name) else default


def _is_map(field: FieldDescriptor) -> bool:
    return field.message_type is not None and field.message_type.GetOptions().map_entry


def _is_needed(field: FieldDescriptor) -> bool:
    rules = _rules(field)
    kind = rules.WhichOneof("type")
    not_in = kind == "enum" and 0 in rules.enum.not_in
    return rules.required or not_in or (kind == "string" and (rules.string.min_len > 0 or bool(rules.string.pattern)))
