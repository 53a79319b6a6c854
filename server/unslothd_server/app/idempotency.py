"""Retries: the same request_id with the same content is the same call, whoever makes it and however often."""

import hashlib
from typing import Generic, TypeVar

from google.protobuf.message import Message

from unslothd.v1.error_reason_pb2 import ErrorReason
from unslothd_server.errors import AlreadyExistsError

T = TypeVar("T")


def content_digest(request: Message) -> str:
    """SHA-256 of a request without its request_id, in hexadecimal digits."""
    content = type(request)()
    content.CopyFrom(request)
    content.ClearField("request_id")
    return hashlib.sha256(content.SerializeToString(deterministic=True)).hexdigest()


class SeenRequests(Generic[T]):
    """Remembers what became of each request_id."""

    def __init__(self) -> None:
        self._seen: dict[str, tuple[str, T]] = {}

    def find(self, request_id: str, digest: str) -> T | None:
        """Returns what an equal call became, or None when the id is new or empty.

        Raises:
            AlreadyExistsError: The id was used with other content.
        """
        if not request_id or request_id not in self._seen:
            return None
        known, result = self._seen[request_id]
        if known != digest:
            raise AlreadyExistsError(
                ErrorReason.ERROR_REASON_REQUEST_ID_REUSED,
                f'request_id "{request_id}" was used before with other content. '
                "Retry with the content of then, or choose a new id (a UUID) for a new call.",
            )
        return result

    def remember(self, request_id: str, digest: str, result: T) -> None:
        """Keeps the result for retries; an empty id is not kept."""
        if request_id:
            self._seen[request_id] = (digest, result)

    def forget(self, request_id: str) -> None:
        """Lets the id be used anew, e.g. after a call that failed."""
        self._seen.pop(request_id, None)
