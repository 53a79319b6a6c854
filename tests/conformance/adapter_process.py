"""A running adapter: commands go in, outcomes come out, and nothing waits for ever."""

import json
import os
import queue
import subprocess
import threading
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from conformance.languages import Language

ANSWER_SECONDS = 30.0
END_SECONDS = 10.0


class AdapterProcess:
    """One client in a process of its own.

    Args:
        language: Whose adapter.
        options: First line: target, and what the client is told otherwise.
        log: File for what it writes to stderr.
    """

    def __init__(self, language: Language, options: dict[str, Any], log: Path) -> None:
        self._log = log
        with log.open("wb") as stderr:
            self._process = subprocess.Popen(
                language.run,
                cwd=language.folder,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                env=os.environ | {"PYTHONPATH": "clients/python"},
            )
        self._lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        self.send(options)

    def send(self, command: dict[str, Any]) -> None:
        """Writes a line."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()

    def hear(self) -> dict[str, Any]:
        """Returns the next line; fails when none comes."""
        try:
            line = self._lines.get(timeout=ANSWER_SECONDS)
        except queue.Empty:
            raise AssertionError(f"the adapter said nothing for {ANSWER_SECONDS} s\n{self._log.read_text()}") from None
        assert line, f"the adapter ended\n{self._log.read_text()}"
        return json.loads(line)

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put("")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(END_SECONDS)
