"""The names of the files in a worker's folder, the same for the worker and for the server that started it."""

from dataclasses import dataclass
from pathlib import Path

BOOTSTRAP_VERSION = 1


@dataclass(frozen=True)
class BundleLayout:
    """A worker's folder.

    Args:
        directory: Absolute path of it.
    """

    directory: Path

    @property
    def bootstrap(self) -> Path:
        """What the worker is told: one binary WorkerBootstrap, written before it starts."""
        return self.directory / "bootstrap.binpb"

    @property
    def lock(self) -> Path:
        """Locked by the worker for as long as it lives."""
        return self.directory / "worker.lock"

    @property
    def socket(self) -> Path:
        """Where it listens, unless that path is too long for a socket; the bootstrap has the true one."""
        return self.directory / "worker.sock"

    @property
    def log(self) -> Path:
        """Its stdout and stderr."""
        return self.directory / "worker.log"

    @property
    def exit_record(self) -> Path:
        """Why it ended; missing when it was killed."""
        return self.directory / "exit.json"

    @property
    def cwd(self) -> Path:
        """Its working directory: Unsloth writes a cache there."""
        return self.directory / "cwd"
