"""When to try again after a lost connection, and when to give up."""

import logging
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from unslothd import errors

_log = logging.getLogger("unslothd")

_FIRST_DELAY = 0.1
_LONGEST_DELAY = 5.0
# A server that has never answered is more likely a wrong target than a restart.
FIRST_CONTACT_TIMEOUT = 5.0


@dataclass
class Peer:
    """What a client knows about its server: whether it has ever answered."""

    heard: bool = False


@dataclass
class Retry:
    """Exponential backoff with jitter, bounded by the time without progress.

    Args:
        peer: Shared by all calls of a client.
        timeout: Seconds without progress after which the error is raised.
        first_contact: The same for a server that has never answered.
        clock: Seconds from any fixed point.
        jitter: Returns a factor for each delay.
    """

    peer: Peer
    timeout: float
    first_contact: float = FIRST_CONTACT_TIMEOUT
    clock: Callable[[], float] = time.monotonic
    jitter: Callable[[], float] = field(default=lambda: random.uniform(0.5, 1.0))  # noqa: S311 - not a secret
    _attempt: int = 0
    _since: float | None = None

    def heard(self) -> None:
        """Notes that the server answered."""
        self.peer.heard = True

    def progress(self) -> None:
        """Notes that the server answered with something new: the next loss starts over."""
        self.heard()
        self._attempt = 0
        self._since = None

    def next_delay(self, error: errors.UnslothdError) -> float:
        """Returns the seconds to wait before the next attempt.

        Raises:
            errors.UnslothdError: `error` itself, when there was no progress for too long.
        """
        now = self.clock()
        patience = self.timeout if self.peer.heard else min(self.timeout, self.first_contact)
        if self._since is None:
            self._since = now
            if patience > 0:
                _log.warning("connection lost, trying again for up to %.0f s: %s", patience, error)
        left = self._since + patience - now
        if left <= 0:
            raise error
        delay = min(_FIRST_DELAY * 2**self._attempt, _LONGEST_DELAY) * self.jitter()
        self._attempt = min(self._attempt + 1, 16)
        return min(delay, left)
