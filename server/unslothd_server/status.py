"""THE table from exception to gRPC status, and the way there and back through google.rpc.Status."""

from google.protobuf.any_pb2 import Any
from google.rpc import code_pb2, error_details_pb2, status_pb2  # pyright: ignore[reportMissingTypeStubs]

from unslothd.v1.error_reason_pb2 import ErrorReason
from unslothd_server import errors

DOMAIN = "unslothd"

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
