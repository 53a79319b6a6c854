"""THE table from exception to gRPC status, and the way there and back through google.rpc.Status."""

from urllib.parse import quote

from google.protobuf.any_pb2 import Any
from google.rpc import code_pb2, error_details_pb2, status_pb2  # pyright: ignore[reportMissingTypeStubs]

from unslothd.v1.error_reason_pb2 import ErrorReason
from unslothd_server import errors

DOMAIN = "unslothd"
# Trailers carry the text twice, once inside the details as base64, beside names and what gRPC adds: 8 KiB in all.
_MAX_SENT_BYTES = 7200
_MAX_TEXT_BYTES = 2000
_MAX_FIELD_BYTES = 400
_SENT_AS_IT_IS = "".join(map(chr, range(0x20, 0x7F))).replace("%", "")

CODES: dict[type[errors.UnslothdError], code_pb2.Code] = {
    errors.InvalidFieldsError: code_pb2.INVALID_ARGUMENT,
    errors.DatasetError: code_pb2.INVALID_ARGUMENT,
    errors.NotFoundError: code_pb2.NOT_FOUND,
    errors.PreconditionError: code_pb2.FAILED_PRECONDITION,
    errors.AlreadyExistsError: code_pb2.ALREADY_EXISTS,
    errors.UnauthenticatedError: code_pb2.UNAUTHENTICATED,
    errors.PermissionDeniedError: code_pb2.PERMISSION_DENIED,
    errors.ExhaustedError: code_pb2.RESOURCE_EXHAUSTED,
    errors.OutOfRangeError: code_pb2.OUT_OF_RANGE,
    errors.UnavailableError: code_pb2.UNAVAILABLE,
    errors.AbortedError: code_pb2.ABORTED,
    errors.NotImplementedYetError: code_pb2.UNIMPLEMENTED,
    errors.UnexpectedError: code_pb2.INTERNAL,
}
_CLASSES: dict[int, type[errors.UnslothdError]] = {
    code_pb2.INVALID_ARGUMENT: errors.DatasetError,
    **{code: kind for kind, code in CODES.items() if code != code_pb2.INVALID_ARGUMENT},
}


def to_status(error: errors.UnslothdError) -> status_pb2.Status:
    """Returns the status of an error: code, text, ErrorInfo and, where fields are wrong, BadRequest."""
    details = [
        _packed(error_details_pb2.ErrorInfo(reason=error.reason_name, domain=DOMAIN, metadata=error.metadata)),
    ]
    if error.violations:
        violations = [
            error_details_pb2.BadRequest.FieldViolation(field=each.field, description=each.description)
            for each in error.violations
        ]
        details.append(_packed(error_details_pb2.BadRequest(field_violations=violations)))
    if error.retry_seconds:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromNanoseconds(int(error.retry_seconds * 1e9))
        details.append(_packed(retry))
    code = next(CODES[kind] for kind in type(error).__mro__ if kind in CODES)
    return status_pb2.Status(code=code, message=error.message, details=details)


def fit_to_send(status: status_pb2.Status) -> status_pb2.Status:
    """Returns the status, cut so that it fits into the trailers of a call, whose usual limit is 8 KiB.

    A text keeps its begin and its end, which is the next step; of many wrong fields the first ones stay. Without this,
    clients would drop the whole status of a request that was wrong in a long way.
    """
    fitting = status_pb2.Status()
    fitting.CopyFrom(status)
    fitting.message = _cut(status.message, _MAX_TEXT_BYTES)
    bad_request = error_details_pb2.BadRequest()
    for detail in fitting.details:
        if detail.Unpack(bad_request):
            detail.Clear()
            room = (_MAX_SENT_BYTES - len(_sent(fitting.message))) * 3 // 4 - fitting.ByteSize()
            detail.Pack(_first_fields(bad_request, room))
    return fitting


def _first_fields(bad_request: error_details_pb2.BadRequest, room: int) -> error_details_pb2.BadRequest:
    kept = error_details_pb2.BadRequest()
    for each in bad_request.field_violations:
        kept.field_violations.add(
            field=_cut(each.field, _MAX_FIELD_BYTES), description=_cut(each.description, _MAX_FIELD_BYTES)
        )
        if kept.ByteSize() > room:
            del kept.field_violations[-1]
            break
    return kept


def _cut(text: str, most: int) -> str:
    """Cuts the middle out of a text so that it is sent in `most` bytes: each byte that is not ASCII takes three."""
    if len(_sent(text)) <= most:
        return text
    head, tail = text[: most * 2 // 3], text[-most // 3 :]
    while len(_sent(f"{head} … {tail}")) > most:
        head, tail = head[: len(head) * 9 // 10], tail[len(tail) // 10 + 1 :]
    return f"{head} … {tail}"


def _sent(text: str) -> str:
    """The text as gRPC sends it."""
    return quote(text, safe=_SENT_AS_IT_IS, errors="replace")


def from_status(status: status_pb2.Status) -> errors.UnslothdError | None:
    """Returns the error that `to_status` made the status of, or None when it was not made by us."""
    info = error_details_pb2.ErrorInfo()
    bad_request = error_details_pb2.BadRequest()
    retry = error_details_pb2.RetryInfo()
    found = False
    for detail in status.details:
        found = (detail.Unpack(info)) or found
        detail.Unpack(bad_request)  # leaves it empty when the detail is something else
        detail.Unpack(retry)
    name = f"ERROR_REASON_{info.reason}"
    if not found or info.domain != DOMAIN or name not in ErrorReason.keys():  # noqa: SIM118 - an enum wrapper
        return None
    kind = _CLASSES[status.code]
    violations = [errors.FieldViolation(each.field, each.description) for each in bad_request.field_violations]
    error = kind.__new__(kind)
    errors.UnslothdError.__init__(
        error,
        ErrorReason.Value(name),
        status.message,
        metadata=dict(info.metadata),
        violations=violations,
        retry_seconds=retry.retry_delay.ToNanoseconds() / 1e9,
    )
    return error


def _packed(message: error_details_pb2.ErrorInfo | error_details_pb2.BadRequest | error_details_pb2.RetryInfo) -> Any:
    packed = Any()
    packed.Pack(message)
    return packed
