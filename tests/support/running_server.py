"""A real server in a process of its own, for tests and benchmarks: started, waited for, always ended."""

import json
import os
import selectors
import signal
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Self

import grpc

from support.heeding_modes import heeding_modes
from unslothd.v1.service_pb2_grpc import UnslothServiceStub

START_SECONDS = 60.0
STOP_SECONDS = 60.0
WITH_FAKE_WORKERS = Path(__file__).parents[1] / "doubles" / "fake_worker_server.py"


class RunningServer:
    """A server with folders of its own below `folder`: home, output and models.

    Args:
        folder: Empty or of an earlier server, which this one then continues.
        fake_workers: Start the double instead of real workers (milliseconds instead of a heavy import).
        program: A program that serves as `unslothd serve` does, with workers of its own kind.
        arguments: Further arguments of `unslothd serve`.
        environment: Further environment variables.
        heeds_modes: File modes hold for it and its workers, also when root runs the tests.
    """

    def __init__(
        self,
        folder: Path,
        *,
        fake_workers: bool = False,
        program: Path | None = None,
        arguments: tuple[str, ...] = (),
        environment: dict[str, str] | None = None,
        heeds_modes: bool = False,
    ) -> None:
        self.home = folder / "home"
        self.output_root = folder / "output"
        self.model_root = folder / "models"
        self.model_root.mkdir(parents=True, exist_ok=True)
        self.log = folder / "server.log"
        program = WITH_FAKE_WORKERS if fake_workers else program
        entry = ["-m", "unslothd_server"] if program is None else [str(program)]
        command = [sys.executable, *entry, "--listen", "127.0.0.1:0", "--home", str(self.home)]
        command += ["--output-root", str(self.output_root), "--model-root", str(self.model_root), *arguments]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                heeding_modes(command) if heeds_modes else command,
                stdout=subprocess.PIPE,
                stderr=log,
                cwd=folder,
                env={
                    **os.environ,
                    "PYTHONPATH": os.pathsep.join(sys.path),
                    "UNSLOTHD_CONFIG": "",  # no file of this machine
                    # Tests count its open files, which a user who is not root could not.
                    "UNSLOTHD_ALLOW_DEBUGGERS": "no" if os.geteuid() == 0 else "yes",
                    "UNSLOTHD_WARM_WORKERS": "0",  # an import costs CPU that tests need; --warm-workers has them
                    **(environment or {}),
                },
            )
        try:
            self.target = self._wait_for_address()
        except BaseException:
            self.kill()
            raise

    def _wait_for_address(self) -> str:
        assert self.process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            if not selector.select(START_SECONDS):
                raise TimeoutError(f"the server said nothing in {START_SECONDS} s:\n{self.log.read_text()}")
        line = self.process.stdout.readline().decode()
        if "is serving on" not in line:
            self.process.wait(STOP_SECONDS)
            raise RuntimeError(f"the server did not start: {line}{self.log.read_text()}")
        return line.split()[-1]

    def channel(self) -> grpc.Channel:
        """Opens a plain channel; close it."""
        return grpc.insecure_channel(self.target, options=[("grpc.max_receive_message_length", 64 * 1024 * 1024)])

    def stub(self) -> UnslothServiceStub:
        """Returns a stub on a channel that lives as long as the stub."""
        return UnslothServiceStub(self.channel())

    def errors_in_log(self) -> str:
        """The last warnings and errors of its log."""
        lines = self.log.read_text(errors="replace").splitlines()
        return "\n".join([line for line in lines if '"level": "info"' not in line][-40:])

    def stop(self) -> int:
        """Ends it as Ctrl-C does; returns the exit code."""
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(STOP_SECONDS)

    def kill(self) -> None:
        """Ends it as a crash does."""
        self.process.kill()
        self.process.wait(STOP_SECONDS)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            try:
                self.stop()
            except subprocess.TimeoutExpired:
                self.kill()
                raise
        if self.process.stdout is not None:
            self.process.stdout.close()


def a_model(server: RunningServer, name: str, **knobs: object) -> Path:
    """A folder that looks like a model, with knobs for the scripted engine."""
    folder = server.model_root / name
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "fake.json").write_text(json.dumps(knobs))
    return folder
