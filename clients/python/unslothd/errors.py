"""What can go wrong in a call, as exceptions that carry the server's code, reason, text and wrong fields.

    UnslothdError
    ├── InvalidRequest       fields or rows are wrong; `field_violations` names every wrong field
    ├── Unauthenticated      no token, or one that the server does not know
    ├── PermissionDenied     a path outside the server's roots, a Hub repository without access
    ├── NotFound             a model, a training, a dataset or the source of one
    ├── AlreadyExists        request_id or output_dir is taken
    ├── FailedPrecondition   right call, wrong moment
    ├── ResourceExhausted    memory, disk, queue, message size
    ├── OutOfRange           a sequence that the training's log does not have
    ├── Aborted              begun and ended: a worker that died
    │   └── TrainingCancelled
    ├── Unavailable          the server cannot be reached, is stopping, or cannot reach the Hub
    ├── DeadlineExceeded     no answer within the call's timeout
    ├── Unimplemented        in the contract, not served by this server
    ├── Internal             a bug; the text names the id that the server's log explains
    └── TrainingFailed       a training that ended in STATE_FAILED, with the code and reason of its cause

To add one: give it the gRPC code in `_BY_CODE`. Programs tell causes apart by `reason`, not by the text.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypedDict, cast

import grpc
from google.protobuf.any_pb2 import Any
from google.protobuf.message import DecodeError
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status

from unslothd._hints import hint

_DOMAIN = "unslothd"
_DETAILS_KEY = "grpc-status-details-bin"
_CODES: dict[int, grpc.StatusCode] = {code.value[0]: code for code in grpc.StatusCode}


@dataclass(frozen=True)
class FieldViolation:
    """One wrong field of a request.

    Args:
        field: Path in the request, e.g. "training_config.learning_rate".
        description: What is wrong with it and what would be right.
    """

    field: str
    description: str


class UnslothdError(Exception):
    """Base of every error of a call.

    Args:
        message: For people: what happened and what to do next.
        code: gRPC status code.
        reason: Stable name of the cause ("MODEL_NOT_FOUND"); empty when the error is not the server's own.
        metadata: Figures for programs, e.g. {"needed_bytes": "123"}.
        field_violations: Every wrong field of the request.
        retry_after: Seconds after which the same call may succeed; 0 = nobody knows.
    """

    def __init__(
        self,
        message: str,
        *,
        code: grpc.StatusCode = grpc.StatusCode.UNKNOWN,
        reason: str = "",
        metadata: Mapping[str, str] | None = None,
        field_violations: Sequence[FieldViolation] = (),
        retry_after: float = 0.0,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        self.reason = reason
        self.metadata = dict(metadata or {})
        self.field_violations = tuple(field_violations)
        self.retry_after = retry_after


class InvalidRequest(UnslothdError):
    """Fields or rows are wrong. Raised by the client too, before anything is sent."""

    def __init__(
        self,
        message: str,
        *,
        code: grpc.StatusCode = grpc.StatusCode.INVALID_ARGUMENT,
        reason: str = "",
        metadata: Mapping[str, str] | None = None,
        field_violations: Sequence[FieldViolation] = (),
        retry_after: float = 0.0,
    ) -> None:
        super().__init__(
            message,
            code=code,
            reason=reason,
            metadata=metadata,
            field_violations=field_violations,
            retry_after=retry_after,
        )


class Unauthenticated(UnslothdError):
    """The call carries no token, or one that the server does not know."""


class PermissionDenied(UnslothdError):
    """The operator or the Hub does not allow it."""


class NotFound(UnslothdError):
    """What the request names does not exist."""


class AlreadyExists(UnslothdError):
    """The name is taken."""


class FailedPrecondition(UnslothdError):
    """The call is right, but not in this state."""


class ResourceExhausted(UnslothdError):
    """Something finite is used up: memory, disk, a queue, the size of a message."""


class OutOfRange(UnslothdError):
    """A position that does not exist."""


class Aborted(UnslothdError):
    """It began and was ended."""


class Unavailable(UnslothdError):
    """Not now; the same call may succeed later."""


class DeadlineExceeded(UnslothdError):
    """No answer within the timeout of the call. It may have taken effect all the same."""


class Unimplemented(UnslothdError):
    """The contract has this call, the server does not serve it."""


class Internal(UnslothdError):
    """A bug in the server."""


class TrainingFailed(UnslothdError):
    """A training ended in STATE_FAILED; code, reason and text are those of its cause."""

    training_id: str = ""


class TrainingCancelled(Aborted):
    """A training was stopped on request."""

    training_id: str = ""


_BY_CODE: dict[grpc.StatusCode, type[UnslothdError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequest,
    grpc.StatusCode.UNAUTHENTICATED: Unauthenticated,
    grpc.StatusCode.PERMISSION_DENIED: PermissionDenied,
    grpc.StatusCode.NOT_FOUND: NotFound,
    grpc.StatusCode.ALREADY_EXISTS: AlreadyExists,
    grpc.StatusCode.FAILED_PRECONDITION: FailedPrecondition,
    grpc.StatusCode.RESOURCE_EXHAUSTED: ResourceExhausted,
    grpc.StatusCode.OUT_OF_RANGE: OutOfRange,
    grpc.StatusCode.ABORTED: Aborted,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.UNIMPLEMENTED: Unimplemented,
    grpc.StatusCode.INTERNAL: Internal,
}


class _RpcError(Protocol):
    """What the errors of grpc and grpc.aio have in common."""

    def code(self) -> grpc.StatusCode | None: ...
    def details(self) -> str | None: ...
    def trailing_metadata(self) -> Iterable[tuple[str, str | bytes]] | None: ...


def from_rpc_error(error: grpc.RpcError, target: str) -> UnslothdError:
    """Returns the exception for an error of grpc or grpc.aio.

    Args:
        error: As raised by a call.
        target: HOST:PORT of the server, for the text of errors that are not the server's own.
    """
    call = cast(_RpcError, error)
    for key, value in call.trailing_metadata() or ():
        if key == _DETAILS_KEY and isinstance(value, bytes):
            found = _parsed(value)
            if found is not None and found.reason:
                return found
    code = call.code() or grpc.StatusCode.UNKNOWN
    text = f"{call.details() or code.name} (server {target})"
    kind = _BY_CODE.get(code, UnslothdError)
    step = hint(code, text)
    return kind(f"{text}. {step}" if step else text, code=code)


def _parsed(details: bytes) -> UnslothdError | None:
    try:
        return from_status(Status.FromString(details))
    except DecodeError:  # not the server's own: what is between may put anything there
        return None


class _Told(TypedDict):
    """What a status says besides its text, as UnslothdError takes it."""

    code: grpc.StatusCode
    reason: str
    metadata: dict[str, str]
    field_violations: list[FieldViolation]
    retry_after: float


def from_status(status: Status) -> UnslothdError:
    """Returns the exception for a google.rpc.Status: that of a call, or of a training's failed event."""
    told = _told(status)
    return _BY_CODE.get(told["code"], UnslothdError)(status.message, **told)


def training_failed(status: Status, training_id: str) -> TrainingFailed:
    """Returns the exception for a training that ended in STATE_FAILED with this error."""
    error = TrainingFailed(status.message or f"training {training_id} failed", **_told(status))
    error.training_id = training_id
    return error


def training_cancelled(training_id: str, step: int) -> TrainingCancelled:
    """Returns the exception for a training that was stopped on request after this optimizer step."""
    error = TrainingCancelled(
        f"training {training_id} was cancelled after step {step}",
        code=grpc.StatusCode.ABORTED,
        reason="TRAINING_CANCELLED",
        metadata={"step": str(step)},
    )
    error.training_id = training_id
    return error


def hub_token_in_plain_text(message: str) -> FailedPrecondition:
    """Returns the exception for a Hugging Face token that is not sent, with the reason that a server refuses it by."""
    return FailedPrecondition(message, code=grpc.StatusCode.FAILED_PRECONDITION, reason="HUB_TOKEN_IN_PLAIN_TEXT")


def _told(status: Status) -> _Told:
    info, retry = ErrorInfo(), RetryInfo()
    violations: list[FieldViolation] = []
    detail: Any
    for detail in status.details:
        bad_request = BadRequest()
        candidate = ErrorInfo()
        if detail.Unpack(bad_request):
            violations += [FieldViolation(each.field, each.description) for each in bad_request.field_violations]
        elif detail.Unpack(candidate) and candidate.domain == _DOMAIN:
            info = candidate
        else:
            detail.Unpack(retry)
    return {
        "code": _CODES.get(status.code, grpc.StatusCode.UNKNOWN),
        "reason": info.reason,
        "metadata": dict(info.metadata),
        "field_violations": violations,
        "retry_after": retry.retry_delay.seconds + retry.retry_delay.nanos / 1e9,
    }
