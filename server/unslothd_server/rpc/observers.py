"""What metrics and traces are told of each call."""

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Protocol

from unslothd_server.access.audit import CallRecord

Metadata = Iterable[tuple[str, str | bytes]]


class CallObserver(Protocol):
    """Is entered when a call begins, and left before its caller hears how it ended."""

    def __call__(self, record: CallRecord, metadata: Metadata) -> AbstractContextManager[None]:
        """Observes one call.

        Args:
            record: Filled in while the call goes on: caller, ids, and at the end code, reason and time.
            metadata: As the caller sent it.
        """
        ...
