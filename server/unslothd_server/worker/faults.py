"""What becomes of an exception in a worker: an error for the caller and a traceback in the log, or the worker's end."""

import logging
from collections.abc import Generator
from contextlib import contextmanager
from uuid import uuid4

import grpc
from grpc_status import rpc_status

from unslothd_server.errors import UnexpectedError, UnslothdError
from unslothd_server.status import fit_to_send, to_status

_log = logging.getLogger(__name__)


class DeviceLostError(BaseException):
    """The GPU's context is broken: every further call in this process fails, so only another process can go on.

    Not an Exception, so that no boundary takes it for the failure of one command.
    """


def end_if_device_is_lost(error: BaseException) -> None:
    """Raises DeviceLostError for what CUDA says once its context is broken: an illegal access, an assert, an ECC error.

    Running out of memory breaks nothing.
    """
    text = str(error)
    if isinstance(error, RuntimeError) and "CUDA error" in text and "out of memory" not in text:
        raise DeviceLostError(f"the GPU's context is lost: {text.splitlines()[0]}") from error


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
    except (Exception, SystemExit) as error:  # noqa: BLE001 - the boundary: every bug becomes INTERNAL with an id
        status = fit_to_send(to_status(as_unslothd_error(error, doing)))
        context.abort_with_status(rpc_status.to_status(status))  # pyright: ignore[reportUnknownMemberType]
