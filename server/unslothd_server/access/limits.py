"""How much one caller may call: a token bucket for calls, a count for streams."""

import math
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field

from unslothd.v1.error_reason_pb2 import ErrorReason
from unslothd.v1.server_info_pb2 import ServerLimits
from unslothd_server.access.callers import Caller
from unslothd_server.errors import ExhaustedError

_MOST_IDLE_ENTRIES = 10_000
_RETRY_STREAM_SECONDS = 5.0


@dataclass(frozen=True)
class CallLimits:
    """What calls may hold and how many there may be. Sizes are bytes, times are seconds.

    Args:
        max_message_bytes: Largest request.
        max_inline_bytes: Most bytes of inline rows of one dataset.
        max_streams: Most streams that a caller has open.
        max_requests_per_second: Most calls of a caller, over some time.
        max_request_burst: Calls that may come at once after a time without any.
        max_deadline_seconds: Longest deadline of a call.
        upload_idle_seconds: How long a sender may be silent.
        min_upload_bytes_per_second: Slowest upload, once its sender was waited for longer than that; 0 = any.
    """

    max_message_bytes: int
    max_inline_bytes: int
    max_streams: int
    max_requests_per_second: float
    max_request_burst: int
    max_deadline_seconds: float
    upload_idle_seconds: float
    min_upload_bytes_per_second: float

    def for_caller(self, caller: Caller) -> ServerLimits:
        """As GetServerInfo tells them; what does not hold for this caller is left out."""
        told = ServerLimits(
            max_message_bytes=self.max_message_bytes,
            max_inline_bytes=self.max_inline_bytes,
            max_deadline_seconds=self.max_deadline_seconds,
            upload_idle_seconds=self.upload_idle_seconds,
            min_upload_bytes_per_second=self.min_upload_bytes_per_second,
        )
        if caller.limited:
            told.max_streams = self.max_streams
            told.max_requests_per_second = self.max_requests_per_second
            told.max_request_burst = self.max_request_burst
        return told


@dataclass
class _Usage:
    """What a caller uses. The bucket is full after a time without calls."""

    left: float
    at: float
    streams: int = field(default=0)


class CallerLimits:
    """Counts the calls and streams of each caller.

    Args:
        limits: How many there may be.
        clock: Seconds from any fixed point.
    """

    def __init__(self, limits: CallLimits, clock: Callable[[], float] = time.monotonic) -> None:
        self._limits = limits
        self._clock = clock
        self._usage: dict[object, _Usage] = {}

    def take_request(self, caller: Caller) -> None:
        """Counts a call. Raises ExhaustedError (TOO_MANY_REQUESTS) with the seconds after which one is taken again."""
        usage = self._of(caller)
        rate, now = self._limits.max_requests_per_second, self._clock()
        usage.left = min(self._limits.max_request_burst, usage.left + (now - usage.at) * rate)
        usage.at = now
        if usage.left < 1:
            raise ExhaustedError(
                ErrorReason.ERROR_REASON_TOO_MANY_REQUESTS,
                f'"{caller.name}" makes more than {rate:g} calls a second, the most that this server takes of one. '
                "Call again after the time of retry_delay, and watch a training with WatchTraining in place of asking.",
                metadata={"max_requests_per_second": f"{rate:g}"},
                retry_seconds=math.ceil((1 - usage.left) / rate * 1000) / 1000,
            )
        usage.left -= 1

    @contextmanager
    def stream(self, caller: Caller) -> Generator[None]:
        """Counts a stream while it is open. Raises ExhaustedError (TOO_MANY_STREAMS)."""
        usage = self._of(caller)
        most = self._limits.max_streams
        if usage.streams >= most:
            raise ExhaustedError(
                ErrorReason.ERROR_REASON_TOO_MANY_STREAMS,
                f'"{caller.name}" has {most} streams open, the most that this server serves one. End one that is not '
                "needed, then call again.",
                metadata={"max_streams": str(most)},
                retry_seconds=_RETRY_STREAM_SECONDS,
            )
        usage.streams += 1
        try:
            yield
        finally:
            usage.streams -= 1

    def _of(self, caller: Caller) -> _Usage:
        key = (caller.kind, caller.name)
        usage = self._usage.get(key)
        if usage is None:
            if len(self._usage) >= _MOST_IDLE_ENTRIES:
                self._forget_idle()
            usage = self._usage[key] = _Usage(self._limits.max_request_burst, self._clock())
        return usage

    def _forget_idle(self) -> None:
        """Drops whoever would have a full bucket again, so that many addresses take no more memory."""
        full_after = self._limits.max_request_burst / self._limits.max_requests_per_second
        now = self._clock()
        self._usage = {key: usage for key, usage in self._usage.items() if usage.streams or now - usage.at < full_after}
