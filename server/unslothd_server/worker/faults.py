"""What becomes of an exception in a worker: an error that a caller may see, and a traceback in the log."""

import logging
from collections.abc import Generator
from contextlib import contextmanager
from uuid import uuid4

import grpc
from grpc_status import rpc_status

from unslothd_server.errors import UnexpectedError, UnslothdError
from unslothd_server.status import to_status

_log = logging.getLogger(__name__)


def as_unslothd_error(error: BaseException, doing: str) -> UnslothdError:
    """Returns the error itself, or for a bug an UnexpectedError whose id leads to the traceback in the log."""
    if isinstance(error, UnslothdError):
        return error
    error_id = uuid4().hex[:12]
    _log.error("error id %s while %s", error_id, doing, exc_info=error)
    return UnexpectedError(error_id)


@contextmanager
def aborting(context: grpc.ServicerContext, doing: str) -> Generator[None]:
    """Ends the call with the rich status of whatever error is raised in the block."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 - the boundary: every bug becomes INTERNAL with an id
        status = to_status(as_unslothd_error(error, doing))
        context.abort_with_status(rpc_status.to_status(status))  # pyright: ignore[reportUnknownMemberType]
