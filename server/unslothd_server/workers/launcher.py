"""Starts workers as local subprocesses, each in a session, folder, environment and log of its own."""

import logging
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from unslothd_server.workers.bundle import Bundle
from unslothd_server.workers.channel import WorkerProcess
from unslothd_server.workers.environment import worker_environment
from unslothd_server.workers.liveness import ProcessHandle, lock_holder
from unslothd_server.workers.timeouts import WorkerTimeouts

WORKER_COMMAND = (sys.executable, "-m", "unslothd_server.worker")

_log = logging.getLogger(__name__)


class LocalLauncher:
    """Implements `app.ports.WorkerLauncher` on this host.

    Args:
        home: Home of the server.
        command: Program and arguments that start a worker; the folder is added. Tests start a double.
        cache_dir: Folder for converted weights; default <home>/cache.
        trust_remote_code: The operator's consent to code from model repositories.
        model_roots: Folders that models may be read from, besides the cache; none = a worker does not look at it.
        environ: Where the workers' environment is taken from, secrets left out; default: this process's.
        timeouts: Bounds of every answer.
    """

    def __init__(
        self,
        home: Path,
        *,
        command: Sequence[str] = WORKER_COMMAND,
        cache_dir: Path | None = None,
        trust_remote_code: bool = False,
        model_roots: Sequence[Path] = (),
        environ: Mapping[str, str] | None = None,
        timeouts: WorkerTimeouts | None = None,
    ) -> None:
        self._home = home.resolve()
        self._command = tuple(command)
        self._cache_dir = (cache_dir or self._home / "cache").resolve()
        self._trust_remote_code = trust_remote_code
        self._model_roots = (*model_roots, self._cache_dir) if model_roots else ()
        self._environ = environ
        self._timeouts = timeouts or WorkerTimeouts()

    async def launch(self, model_id: str, *, device_map: str) -> WorkerProcess:
        """Starts a worker for a model; returns once it answers. Nothing stays behind when it does not.

        A worker of the model that an earlier server left is ended first.

        Raises:
            AbortedError: It died, or did not answer in time (WORKER_DIED, WORKER_UNRESPONSIVE).
        """
        await self._end_leftover(model_id)
        # Milliseconds, and not in a thread: a cancelled launch would lose what the thread goes on to make.
        bundle = Bundle.create(
            self._home,
            model_id,
            device_map=device_map,
            cache_dir=self._cache_dir,
            trust_remote_code=self._trust_remote_code,
            model_roots=self._model_roots,
        )
        return await self._start(bundle)

    async def launch_spare(self) -> WorkerProcess:
        """Starts a worker that imports and waits for a model; as `launch` otherwise."""
        bundle = Bundle.create_spare(
            self._home,
            cache_dir=self._cache_dir,
            trust_remote_code=self._trust_remote_code,
            model_roots=self._model_roots,
        )
        return await self._start(bundle)

    async def hand_over(self, spare: WorkerProcess, model_id: str, *, device_map: str) -> None:
        """Makes a spare the worker of a model, as if it had been launched for it. The caller ends it if that fails.

        Raises:
            AbortedError: It died, or did not answer in time (WORKER_DIED, WORKER_UNRESPONSIVE).
        """
        await self._end_leftover(model_id)
        Bundle.remove_of(model_id, self._home)
        await spare.take_model(model_id, device_map=device_map)
        _log.info("worker is process %d, which stood ready", spare.pid, extra={"model_id": model_id})

    def attach_living(self) -> list[WorkerProcess]:
        """Returns the workers of this home that live, whoever started them: to go on with, or to stop."""
        found = [self._attach(bundle) for bundle in Bundle.all_in(self._home)]
        return [worker for worker in found if worker is not None]

    def remove_dead_spares(self) -> None:
        """Removes the folders of spares of earlier servers, which ended without one that would see it."""
        for bundle in Bundle.all_in(self._home):
            if bundle.is_spare and lock_holder(bundle.layout.lock) is None:
                bundle.remove(self._home)

    def _attach(self, bundle: Bundle) -> WorkerProcess | None:
        return WorkerProcess.attach(bundle, self._home, self._timeouts)

    async def _end_leftover(self, model_id: str) -> None:
        for bundle in Bundle.all_in(self._home):
            leftover = self._attach(bundle) if bundle.model_id == model_id else None
            if leftover is not None:
                await leftover.kill()  # asked to end, it would end its training for good

    async def _start(self, bundle: Bundle) -> WorkerProcess:
        child = self._spawn(bundle)
        worker = WorkerProcess(bundle, self._home, ProcessHandle(child.pid), child, self._timeouts)
        try:
            await worker.wait_listening()
        except BaseException:
            await worker.kill()
            raise
        _log.info("worker is process %d", child.pid, extra={"model_id": worker.model_id})
        return worker

    def _spawn(self, bundle: Bundle) -> "subprocess.Popen[bytes]":
        layout = bundle.layout
        environment = worker_environment(os.environ if self._environ is None else self._environ)
        log = os.open(layout.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            return subprocess.Popen(  # noqa: S603 - the command is the operator's or a test's, never a request's
                [*self._command, str(layout.directory)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=layout.cwd,
                env=environment,
                start_new_session=True,
            )
        finally:
            os.close(log)
