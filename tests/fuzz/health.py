"""How a server is: memory, open files and children of its process, over a run."""

from dataclasses import dataclass

import psutil


@dataclass(frozen=True)
class Sample:
    """One look.

    Args:
        requests: Answered so far.
        memory_bytes: Resident memory of the server's process.
        files: Its open files, sockets included.
        threads: Its threads.
    """

    requests: int
    memory_bytes: int
    files: int
    threads: int


class Health:
    """Looks at a server now and then.

    Args:
        pid: Its process.
    """

    def __init__(self, pid: int) -> None:
        self._process = psutil.Process(pid)
        self.samples: list[Sample] = []

    def look(self, requests: int) -> None:
        """Takes a sample."""
        with self._process.oneshot():
            self.samples.append(
                Sample(
                    requests,
                    self._process.memory_info().rss,
                    self._process.num_fds(),
                    self._process.num_threads(),
                )
            )

    def bytes_a_request(self, since: int) -> float:
        """The slope of memory over requests, by least squares, from the request `since` on."""
        seen = [sample for sample in self.samples if sample.requests >= since]
        if len(seen) < 3:
            return 0.0
        mean_x = sum(sample.requests for sample in seen) / len(seen)
        mean_y = sum(sample.memory_bytes for sample in seen) / len(seen)
        over = sum((sample.requests - mean_x) * (sample.memory_bytes - mean_y) for sample in seen)
        return over / (sum((sample.requests - mean_x) ** 2 for sample in seen) or 1.0)
