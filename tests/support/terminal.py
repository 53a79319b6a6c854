"""The command line in a process of its own, behind a pseudo-terminal, as a person has it."""

import os
import pty
import signal
import subprocess
import sys
import threading
from types import TracebackType
from typing import Self

SECONDS = 30.0
PRESSES = 10


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "COLUMNS": "100", "TERM": "xterm-256color"}


class Terminal:
    """A command that runs, what it shows, and a keyboard."""

    def __init__(self, *arguments: str) -> None:
        self._master, slave = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "unslothd.cli", *arguments],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=environment(),
            start_new_session=True,
        )
        os.close(slave)
        self._shown = ""
        self._more = threading.Condition()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        while True:
            try:
                data = os.read(self._master, 65536)
            except OSError:  # the other side is closed
                return
            if not data:
                return
            with self._more:
                self._shown += data.decode(errors="replace")
                self._more.notify_all()

    def enter(self, line: str) -> None:
        """Types a line."""
        os.write(self._master, f"{line}\n".encode())

    def interrupt(self) -> None:
        """Does what Ctrl-C does."""
        self.process.send_signal(signal.SIGINT)

    def interrupt_at_prompt(self, text: str, *, times: int) -> None:
        """Presses Ctrl-C until a text has been shown so often.

        One press can be lost: readline shows its prompt a moment before it notices signals. A person presses again.
        """
        for _ in range(PRESSES):
            self.interrupt()
            with self._more:
                if self._more.wait_for(lambda: self._shown.count(text) >= times, SECONDS / PRESSES):
                    return
        self.wait_for(text, times=times)

    def wait_for(self, text: str, *, times: int = 1) -> None:
        """Waits until a text has been shown so often."""
        with self._more:
            found = self._more.wait_for(lambda: self._shown.count(text) >= times, SECONDS)
        assert found, f"{text!r} was not shown {times} times in {SECONDS} s: {self._shown!r}"

    def wait(self) -> tuple[int, str]:
        """Waits for the end of the command; returns its exit code and all that it showed."""
        try:
            code = self.process.wait(SECONDS)
        finally:
            self.close()
        return code, self._shown

    def close(self) -> None:
        """Ends the command, if it has not ended, and the terminal."""
        if self._reader.is_alive() or self.process.poll() is None:
            self.process.kill()
            self.process.wait(SECONDS)
        self._reader.join(SECONDS)
        if self._master >= 0:
            os.close(self._master)
            self._master = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
