"""A server for the demo: `unslothd serve` in a process of its own, started, waited for, and always ended."""

import contextlib
import selectors
import signal
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path

import psutil

START_SECONDS = 60.0
STOP_SECONDS = 30.0
# What ends a program from outside: Ctrl-C, kill, a closed terminal.
INTERRUPTS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextlib.contextmanager
def own_server(folder: Path, model_root: Path, port: int = 0) -> Generator[str]:
    """Runs a server with its state, results and log below `folder`; yields HOST:PORT.

    However the block is left, the server and its workers have ended afterwards.

    Args:
        folder: Made if needed; what an earlier server left there is kept.
        model_root: Folder that models may be loaded from.
        port: To serve on; 0 takes a free one.

    Raises:
        SystemExit: It did not start; the text says why and where its log is.
    """
    log_file = folder / "server.log"
    command = [sys.executable, "-m", "unslothd.cli", "serve", "--listen", f"127.0.0.1:{port}"]
    command += ["--home", str(folder / "home"), "--output-root", str(folder / "output")]
    command += ["--model-root", str(model_root)]
    with log_file.open("wb") as log:
        # A process group of its own: Ctrl-C in the terminal reaches the demo, and the demo ends the server.
        server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, process_group=0)
    try:
        yield _address(server, log_file)
    finally:
        _stop(server)


def _address(server: subprocess.Popen[bytes], log_file: Path) -> str:
    """Waits for the line "unslothd … is serving on HOST:PORT"."""
    assert server.stdout is not None
    with selectors.DefaultSelector() as selector:
        selector.register(server.stdout, selectors.EVENT_READ)
        line = server.stdout.readline().decode() if selector.select(START_SECONDS) else ""
    if "is serving on" not in line:
        last_lines = "\n".join(log_file.read_text(errors="replace").splitlines()[-5:])
        raise SystemExit(f"The server did not start. The end of its log, {log_file}:\n{last_lines}")
    return line.split()[-1]


def _stop(server: subprocess.Popen[bytes]) -> None:
    """Asks the server to end, which unloads its models; ends it and its workers by force where that takes too long."""
    # A second Ctrl-C must not leave half of them behind.
    handlers = {number: signal.signal(number, signal.SIG_IGN) for number in INTERRUPTS}
    try:
        workers = _children(server.pid)
        server.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(STOP_SECONDS)
        workers += _children(server.pid)
        server.kill()
        server.wait()
        for worker in workers:
            with contextlib.suppress(psutil.NoSuchProcess):
                worker.kill()
        psutil.wait_procs(workers, timeout=STOP_SECONDS)
        if server.stdout is not None:
            server.stdout.close()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _children(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []
