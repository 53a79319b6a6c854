"""Checks a request against the rules in the contract: every bad field at once."""

import protovalidate
from google.protobuf.message import Message

from unslothd_server.errors import FieldViolation, InvalidFieldsError

_validator = protovalidate.Validator()


def validate(request: Message) -> None:
    """Raises InvalidFieldsError that names every field which breaks a rule of the contract."""
    violations = _validator.collect_violations(request)
    if violations:
        raise InvalidFieldsError([FieldViolation(_path(each), each.proto.message) for each in violations])


def _path(violation: protovalidate.Violation) -> str:
    """The field as people write it, e.g. "lora.target_modules[2]"."""
    parts: list[str] = []
    for element in violation.proto.field.elements if violation.proto.field else ():
        subscript = element.subscript
        index = f"[{subscript.value!r}]" if subscript is not None else ""
        parts.append(f"{element.field_name}{index}")
    return ".".join(parts) or "request"
