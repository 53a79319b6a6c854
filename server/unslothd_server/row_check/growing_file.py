"""A file that is read while another process still writes it."""

import io
import mmap
import os
from pathlib import Path
from typing import Any, BinaryIO

END = b"end\n"
# Smaller reads are copied: a mapping costs more than they do.
_MAP_FROM_BYTES = 256 * 1024


class GrowingFile(io.RawIOBase):
    """Reads what is there and waits for the rest.

    Args:
        path: The file.
        news: Lines that say how many bytes of it are there; the last line is "end".
    """

    def __init__(self, path: Path, news: BinaryIO) -> None:
        super().__init__()
        self._file = path.open("rb", buffering=0)
        self._news = news
        self._size = 0
        self._ended = False
        self._position = 0

    def wait_for(self, num_bytes: int) -> int:
        """Returns once so many bytes are there, or the file has ended; returns how many are there, at most these.

        Raises:
            SystemExit: The upload was given up.
        """
        while self._size < num_bytes and not self._ended:
            line = self._news.readline()
            if not line:
                raise SystemExit(0)
            if line == END:
                self._ended = True
            else:
                self._size = int(line)
        return min(num_bytes, self._size)

    def wait_for_end(self) -> int:
        """Returns once all bytes are there; returns their number."""
        while not self._ended:
            self.wait_for(self._size + 1)
        return self._size

    def peek(self, size: int) -> bytes:
        """Returns the first bytes of the file, fewer only when it has fewer; they are still to be read."""
        return os.pread(self._file.fileno(), self.wait_for(size), 0)

    def readable(self) -> bool:
        """Is always true."""
        return True

    def tell(self) -> int:
        """Returns the number of bytes that were read."""
        return self._position

    def readinto(self, buffer: "memoryview[int]", /) -> int:  # pyright: ignore[reportIncompatibleMethodOverride] - what BufferedReader passes
        """Reads at least one byte, unless the file has ended."""
        self.wait_for(self._position + 1)
        count = min(len(buffer), self._size - self._position)
        count = os.preadv(self._file.fileno(), [memoryview(buffer)[:count]], self._position)
        self._position += count
        return count

    def read(self, size: int = -1, /) -> Any:  # bytes, or a view: pyarrow takes both
        """Reads `size` bytes, fewer only at the end; large parts are mapped, so that they cost no memory."""
        end = self.wait_for_end() if size < 0 else self.wait_for(self._position + size)
        start, self._position = self._position, end
        if end - start < _MAP_FROM_BYTES:
            return os.pread(self._file.fileno(), end - start, start)
        aligned = start - start % mmap.ALLOCATIONGRANULARITY
        mapped = mmap.mmap(self._file.fileno(), end - aligned, access=mmap.ACCESS_READ, offset=aligned)
        return memoryview(mapped)[start - aligned :]

    def close(self) -> None:
        """Closes the file. Repeatable."""
        self._file.close()
        super().close()
