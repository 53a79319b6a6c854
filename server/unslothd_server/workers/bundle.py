"""A worker's folder as the server handles it: made before the start, found after a restart, removed at the end."""

import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from unslothd.worker.v1.bootstrap_pb2 import WorkerBootstrap
from unslothd_server.worker.layout import BOOTSTRAP_VERSION, BundleLayout

MAX_SOCKET_PATH_BYTES = 107  # of sockaddr_un on Linux, without the closing zero


@dataclass(frozen=True)
class Bundle:
    """The folder of one worker.

    Args:
        layout: Names of the files in it.
        bootstrap: What the worker was told.
    """

    layout: BundleLayout
    bootstrap: WorkerBootstrap

    @property
    def model_id(self) -> str:
        """Model that the worker holds."""
        return self.bootstrap.model_id

    @property
    def socket_path(self) -> Path:
        """Where the worker listens."""
        return Path(self.bootstrap.socket_path)

    @classmethod
    def create(
        cls, home: Path, model_id: str, *, device_map: str, cache_dir: Path, trust_remote_code: bool = False
    ) -> "Bundle":
        """Makes the folder, mode 0700, with the bootstrap file in it. What a dead predecessor left is removed.

        Args:
            home: Home of the server; made when it does not exist.
            model_id: A plain name; the folder gets it.
            device_map: Where the model goes.
            cache_dir: Folder for converted weights, shared by workers.
            trust_remote_code: The operator's consent to code from model repositories.

        Raises:
            ValueError: model_id is not a plain name.
        """
        if model_id in {"", ".", ".."} or "/" in model_id or "\0" in model_id:
            raise ValueError(f"{model_id!r} cannot be the name of a folder")
        home = home.resolve()
        directory = home / "workers" / model_id
        if directory.exists():
            cls.open(directory).remove(home)
        directory.mkdir(parents=True, mode=0o700)
        layout = BundleLayout(directory)
        layout.cwd.mkdir(mode=0o700)
        layout.lock.touch(mode=0o600)
        bootstrap = WorkerBootstrap(
            bootstrap_version=BOOTSTRAP_VERSION,
            model_id=model_id,
            bundle_dir=str(directory),
            socket_path=str(_socket_path(layout)),
            server_home=str(home),
            trust_remote_code=trust_remote_code,
            device_map=device_map,
            cache_dir=str(cache_dir),
        )
        draft = layout.bootstrap.with_suffix(".tmp")
        draft.write_bytes(bootstrap.SerializeToString())
        draft.replace(layout.bootstrap)
        return cls(layout, bootstrap)

    @classmethod
    def open(cls, directory: Path) -> "Bundle":
        """Returns the folder of an earlier worker, whole or not: without a bootstrap file its socket is unknown."""
        layout = BundleLayout(directory)
        try:
            bootstrap = WorkerBootstrap.FromString(layout.bootstrap.read_bytes())
        except FileNotFoundError:
            bootstrap = WorkerBootstrap(model_id=directory.name)
        return cls(layout, bootstrap)

    def remove(self, home: Path) -> None:
        """Removes the folder and the socket. The log is kept as <home>/logs/worker-<model_id>.log. Repeatable.

        Errors that callers saw have ids that only this log explains; the next worker of the same id replaces it.
        """
        if self.layout.log.exists():
            logs = home / "logs"
            logs.mkdir(parents=True, exist_ok=True, mode=0o700)
            self.layout.log.replace(logs / f"worker-{self.model_id}.log")
        socket = self.socket_path
        if self.bootstrap.socket_path and socket.parent != self.layout.directory:
            socket.unlink(missing_ok=True)
            if socket.parent.exists():
                socket.parent.rmdir()
        if self.layout.directory.exists():
            shutil.rmtree(self.layout.directory)


def _socket_path(layout: BundleLayout) -> Path:
    if len(os.fsencode(layout.socket)) <= MAX_SOCKET_PATH_BYTES:
        return layout.socket
    return Path(tempfile.mkdtemp(prefix="unslothd-")) / layout.socket.name  # mkdtemp makes it 0700
