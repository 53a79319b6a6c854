"""What callers are told while the server stops: to call again, and where to go on."""

from unslothd.v1.error_reason_pb2 import ErrorReason
from unslothd_server.errors import UnavailableError

# A server that is started anew serves after about a second; a host needs longer, and clients try again anyway.
_RETRY_SECONDS = 5.0


def stopping() -> UnavailableError:
    """The error of a call that comes, or is still waiting, while the server stops."""
    return _unavailable("The server is stopping; call again once it is back.")


def watch_interrupted() -> UnavailableError:
    """The error that ends a watch whose training goes on."""
    return _unavailable(
        "The server is stopping. Once it is back, WatchTraining after your last sequence shows the rest."
    )


def _unavailable(message: str) -> UnavailableError:
    return UnavailableError(ErrorReason.ERROR_REASON_SERVER_STOPPING, message, retry_seconds=_RETRY_SECONDS)
