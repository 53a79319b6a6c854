"""The exception tree: everything that can go wrong in words, before any of it is gRPC.

    UnslothdError
    ├── InvalidFieldsError          one or more fields of a request
    ├── DatasetError                rows that cannot be trained on or stored: DATASET_ROW and the like
    ├── NotFoundError               a model, a training, a dataset or the source of one
    ├── PreconditionError           right call, wrong moment
    ├── AlreadyExistsError          request_id or output_dir is taken
    ├── UnauthenticatedError        no token, or one that is not known or expired
    ├── PermissionDeniedError       a path outside the roots, a Hub repository without access, too small a scope
    ├── ExhaustedError              memory, disk, queue, message size, calls a second
    ├── OutOfRangeError             a sequence that the log does not have
    ├── UnavailableError            the Hub, or a server that is stopping: try again later
    ├── AbortedError                a worker that died, a training that was cancelled, an upload that stalled
    ├── NotImplementedYetError      in the contract, not served yet
    └── UnexpectedError             a bug; carries an id, the log has the rest

To add a reason: add it to `error_reason.proto` with its code and meaning, and raise the class whose code that is.
`status.py` holds the one table from class to gRPC code. The text of an error ends with what to do next.
"""

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from unslothd.v1.error_reason_pb2 import ErrorReason


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
    """Base of every error that a caller may see.

    Args:
        reason: Stable name of the cause.
        message: For people: what happened and what to do next.
        metadata: Figures for programs, e.g. {"needed_bytes": "123"}; becomes ErrorInfo.metadata.
        violations: Wrong fields, all of them; becomes BadRequest.
        retry_seconds: When the same call may succeed; becomes RetryInfo. 0 = nobody knows.
    """

    def __init__(
        self,
        reason: "ErrorReason.ValueType",
        message: str,
        *,
        metadata: Mapping[str, str] | None = None,
        violations: Sequence[FieldViolation] = (),
        retry_seconds: float = 0.0,
    ) -> None:
        super().__init__(message)
        self.retry_seconds = retry_seconds
        self.reason = reason
        self.message = message
        self.metadata = dict(metadata or {})
        self.violations = tuple(violations)

    @property
    def reason_name(self) -> str:
        """The reason as ErrorInfo carries it, e.g. "MODEL_NOT_FOUND"."""
        return ErrorReason.Name(self.reason).removeprefix("ERROR_REASON_")


class InvalidFieldsError(UnslothdError):
    """One or more fields of a request are wrong."""

    def __init__(self, violations: Sequence[FieldViolation]) -> None:
        text = "; ".join(f"{violation.field}: {violation.description}" for violation in violations)
        super().__init__(ErrorReason.ERROR_REASON_INVALID_FIELD, text, violations=violations)


class DatasetError(UnslothdError):
    """The rows cannot be trained on."""


class NotFoundError(UnslothdError):
    """What the request names does not exist."""


class PreconditionError(UnslothdError):
    """The call is right, but not in this state."""


class AlreadyExistsError(UnslothdError):
    """The name is taken."""


class UnauthenticatedError(UnslothdError):
    """The server asks who calls, and cannot tell."""


class PermissionDeniedError(UnslothdError):
    """The operator or the Hub does not allow it."""


class ExhaustedError(UnslothdError):
    """Something finite is used up."""


class OutOfRangeError(UnslothdError):
    """A position that does not exist."""


class UnavailableError(UnslothdError):
    """Not now; the same call may succeed later."""


class AbortedError(UnslothdError):
    """It began and was ended."""


class NotImplementedYetError(UnslothdError):
    """The contract has it, this server does not serve it yet."""

    def __init__(self, what: str) -> None:
        super().__init__(
            ErrorReason.ERROR_REASON_NOT_IMPLEMENTED,
            f"{what} is in the contract but not served by this version yet; see CHANGELOG.md for what is.",
        )


class UnexpectedError(UnslothdError):
    """A bug: the caller gets an id, the log gets the traceback.

    Args:
        error_id: What the log names the traceback by; by default a new one.
    """

    def __init__(self, error_id: str = "") -> None:
        error_id = error_id or uuid.uuid4().hex[:12]
        super().__init__(
            ErrorReason.ERROR_REASON_INTERNAL,
            f"Something unexpected happened in the server. Its log explains error id {error_id}.",
            metadata={"error_id": error_id},
        )
        self.error_id = error_id
