"""From what gRPC says about a call on a worker to the errors that the rest of the server knows."""

import logging
from uuid import uuid4

import grpc
import grpc.aio
from google.rpc import status_pb2  # pyright: ignore[reportMissingTypeStubs]

from unslothd_server.errors import UnexpectedError, UnslothdError
from unslothd_server.status import from_status

DETAILS_KEY = "grpc-status-details-bin"

_log = logging.getLogger(__name__)
# The connection or the deadline failed, not the worker's code: whether it died has to be looked at.
_BROKEN = frozenset({grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED})


def is_broken(error: grpc.aio.AioRpcError) -> bool:
    """Tells whether the call failed without an answer of the worker's code."""
    return error.code() in _BROKEN and _details(error) is None


def answered_error(error: grpc.aio.AioRpcError) -> UnslothdError:
    """Returns the error that the worker answered with; what it cannot have meant is a bug, with an id."""
    details = _details(error)
    known = None if details is None else from_status(details)
    if known is not None:
        return known
    error_id = uuid4().hex[:12]
    _log.error("a worker answered %s: %s", error.code().name, error.details(), extra={"error_id": error_id})
    return UnexpectedError(error_id)


def _details(error: grpc.aio.AioRpcError) -> status_pb2.Status | None:
    for key, value in error.trailing_metadata():
        if key == DETAILS_KEY and isinstance(value, bytes):
            return status_pb2.Status.FromString(value)
    return None
