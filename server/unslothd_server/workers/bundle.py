"""A worker's folder as the server handles it: made before the start, found after a restart, removed at the end."""

import errno
import os
import secrets
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from google.protobuf.message import DecodeError

from unslothd.worker.v1.bootstrap_pb2 import WorkerBootstrap
from unslothd_server.worker.layout import BOOTSTRAP_VERSION, BundleLayout

MAX_SOCKET_PATH_BYTES = 107  # of sockaddr_un on Linux, without the closing zero
SPARE_PREFIX = "spare-"
# Of a folder in which a dying process may still write, or that another thread removes as well.
_REMOVAL_TRIES = 10


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
        """Model that the worker holds; the folder's name where it has none."""
        return self.bootstrap.model_id or self.layout.directory.name

    @property
    def is_spare(self) -> bool:
        """True for the folder of a worker that was never given a model."""
        return not self.bootstrap.model_id and self.layout.directory.name.startswith(SPARE_PREFIX)

    @property
    def socket_path(self) -> Path:
        """Where the worker listens."""
        return Path(self.bootstrap.socket_path)

    @classmethod
    def create(
        cls,
        home: Path,
        model_id: str,
        *,
        device_map: str,
        cache_dir: Path,
        trust_remote_code: bool = False,
        model_roots: Sequence[Path] = (),
    ) -> "Bundle":
        """Makes the folder, mode 0700, with the bootstrap file in it. What a dead predecessor left is removed.

        Args:
            home: Home of the server; made when it does not exist.
            model_id: A plain name; the folder gets it.
            device_map: Where the model goes.
            cache_dir: Folder for converted weights, shared by workers.
            trust_remote_code: The operator's consent to code from model repositories.
            model_roots: Where models may lie.

        Raises:
            ValueError: model_id is not a plain name.
        """
        _check_plain(model_id)
        home = home.resolve()
        cls.remove_of(model_id, home)
        told = WorkerBootstrap(
            model_id=model_id,
            device_map=device_map,
            trust_remote_code=trust_remote_code,
            model_roots=map(str, model_roots),
        )
        return cls._make(home, model_id, told, cache_dir)

    @classmethod
    def create_spare(
        cls, home: Path, *, cache_dir: Path, trust_remote_code: bool = False, model_roots: Sequence[Path] = ()
    ) -> "Bundle":
        """As `create`, for a worker of this server that has no model yet; its folder keeps the name that it gets."""
        told = WorkerBootstrap(
            server_pid=os.getpid(), trust_remote_code=trust_remote_code, model_roots=map(str, model_roots)
        )
        return cls._make(home.resolve(), f"{SPARE_PREFIX}{secrets.token_hex(4)}", told, cache_dir)

    @classmethod
    def _make(cls, home: Path, name: str, told: WorkerBootstrap, cache_dir: Path) -> "Bundle":
        layout = BundleLayout(home / "workers" / name)
        layout.directory.mkdir(parents=True, mode=0o700)
        layout.cwd.mkdir(mode=0o700)
        layout.lock.touch(mode=0o600)
        told.bootstrap_version = BOOTSTRAP_VERSION
        told.bundle_dir = str(layout.directory)
        told.socket_path = str(_socket_path(layout))
        told.server_home = str(home)
        told.cache_dir = str(cache_dir)
        return cls._written(layout, told)

    @classmethod
    def _written(cls, layout: BundleLayout, bootstrap: WorkerBootstrap) -> "Bundle":
        draft = layout.bootstrap.with_suffix(".tmp")
        draft.write_bytes(bootstrap.SerializeToString())
        draft.replace(layout.bootstrap)
        return cls(layout, bootstrap)

    def given_to(self, model_id: str, *, device_map: str) -> "Bundle":
        """Returns the folder of this spare as that of a model's worker, written in one step.

        Raises:
            ValueError: model_id is not a plain name.
        """
        _check_plain(model_id)
        told = WorkerBootstrap()
        told.CopyFrom(self.bootstrap)
        told.ClearField("server_pid")
        told.model_id, told.device_map = model_id, device_map
        return self._written(self.layout, told)

    @classmethod
    def all_in(cls, home: Path) -> "list[Bundle]":
        """Returns the folders of all workers of a home, living and dead."""
        workers = home / "workers"
        directories = sorted(workers.iterdir()) if workers.is_dir() else []
        return [cls.open(directory) for directory in directories if directory.is_dir()]

    @classmethod
    def remove_of(cls, model_id: str, home: Path) -> None:
        """Removes what a dead worker of this model left, whatever its folder is called."""
        for bundle in cls.all_in(home):
            if bundle.model_id == model_id:
                bundle.remove(home)

    @classmethod
    def open(cls, directory: Path) -> "Bundle":
        """Returns the folder of an earlier worker, whole or not: without its bootstrap the socket is unknown."""
        layout = BundleLayout(directory)
        try:
            bootstrap = WorkerBootstrap.FromString(layout.bootstrap.read_bytes())
        except (FileNotFoundError, DecodeError):
            bootstrap = WorkerBootstrap()
        return cls(layout, bootstrap)

    def remove(self, home: Path) -> None:
        """Removes the folder and the socket. The log is kept as <home>/logs/worker-<model_id>.log.

        Errors that callers saw have ids that only this log explains; the next worker of the same id replaces it.
        Repeatable, also at the same time: an unload and the next load of the same id may both come to it.

        Raises:
            OSError: The folder cannot be removed.
        """
        logs = home / "logs"
        logs.mkdir(parents=True, exist_ok=True, mode=0o700)
        with suppress(FileNotFoundError):
            self.layout.log.replace(logs / f"worker-{'spare' if self.is_spare else self.model_id}.log")
        socket = self.socket_path
        if self.bootstrap.socket_path and socket.parent != self.layout.directory:
            socket.unlink(missing_ok=True)
            with suppress(FileNotFoundError):
                socket.parent.rmdir()
        _remove_folder(self.layout.directory)


def _remove_folder(folder: Path) -> None:
    for tries_left in reversed(range(_REMOVAL_TRIES)):
        try:
            shutil.rmtree(folder)
        except OSError as error:
            if not folder.exists():
                return
            # Entries that came or went after they were listed.
            if error.errno not in (errno.ENOTEMPTY, errno.ENOENT) or not tries_left:
                raise
        else:
            return


def _check_plain(model_id: str) -> None:
    if model_id in {"", ".", ".."} or "/" in model_id or "\0" in model_id:
        raise ValueError(f"{model_id!r} cannot be the name of a folder")


def _socket_path(layout: BundleLayout) -> Path:
    if len(os.fsencode(layout.socket)) <= MAX_SOCKET_PATH_BYTES:
        return layout.socket
    return Path(tempfile.mkdtemp(prefix="unslothd-")) / layout.socket.name  # mkdtemp makes it 0700
