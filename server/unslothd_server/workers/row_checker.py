"""Checks rows in a process of its own, so that hostile bytes meet native code where they can do no harm."""

import asyncio
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from unslothd.v1.dataset_pb2 import DataFormat
from unslothd.v1.error_reason_pb2 import ErrorReason
from unslothd_server.app.ports import RowsFound
from unslothd_server.errors import DatasetError, FieldViolation
from unslothd_server.row_check.growing_file import END
from unslothd_server.row_check.verdict import MAX_BAD_ROWS, Verdict

CHECK_COMMAND = (sys.executable, "-P", "-m", "unslothd_server.row_check")
_FORMATS = {
    DataFormat.DATA_FORMAT_JSONL: "jsonl",
    DataFormat.DATA_FORMAT_PARQUET: "parquet",
    DataFormat.DATA_FORMAT_ARROW_STREAM: "arrow",
    DataFormat.DATA_FORMAT_CSV: "csv",
}
# All that the process gets of the server's environment: nothing of it is a secret.
_KEPT = ("PATH", "LD_LIBRARY_PATH", "LANG", "LC_ALL", "TZ", "PYTHONPATH", "PYTHONHOME")
# The system's allocator reserves nothing ahead, so that the process's limit is what it uses.
_ALWAYS = {"ARROW_DEFAULT_MEMORY_POOL": "system", "OMP_NUM_THREADS": "1"}
_MAX_VERDICT_BYTES = 4 * 1024 * 1024
# After the last byte; the slowest honest data is checked at 50 MB/s.
_SECONDS = 60.0
_SECONDS_PER_BYTE = 1 / 5e6


class SubprocessRowChecker:
    """Implements `app.ports.RowChecker`.

    Args:
        command: Program and arguments; format and file are added. Tests start a double.
        environ: Where the environment is taken from; default: this process's.
        seconds: Bound on the time from the last byte to the verdict, more for large files.
    """

    def __init__(
        self,
        *,
        command: Sequence[str] = CHECK_COMMAND,
        environ: Mapping[str, str] | None = None,
        seconds: float = _SECONDS,
    ) -> None:
        self._command = tuple(command)
        self._environ = environ
        self._seconds = seconds

    async def start(self, rows: Path, data_format: "DataFormat.ValueType") -> "RowCheckProcess":
        """Starts the process. Raises OSError when the host has no room for it."""
        process = await asyncio.create_subprocess_exec(
            *self._command,
            _FORMATS[data_format],
            str(rows),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=_MAX_VERDICT_BYTES,
            cwd="/",
            env=_environment(os.environ if self._environ is None else self._environ),
            start_new_session=True,  # Ctrl-C is for the server
        )
        return RowCheckProcess(process, self._seconds)


class RowCheckProcess:
    """One check; implements `app.ports.RowCheck`.

    Args:
        process: Its stdin takes sizes, its stdout gives the verdict.
        seconds: As of the checker.
    """

    def __init__(self, process: asyncio.subprocess.Process, seconds: float) -> None:
        assert process.stdin is not None
        self._process = process
        self._news = process.stdin
        self._seconds = seconds
        self._num_bytes = 0
        self._given_up = False
        self._answer = asyncio.create_task(self._read())

    @property
    def over(self) -> bool:
        """True once the verdict is there."""
        return self._answer.done()

    def grown(self, num_bytes: int) -> None:
        """Tells how many bytes of the file are there."""
        self._num_bytes = num_bytes
        self._tell(b"%d\n" % num_bytes)

    def end(self) -> None:
        """Tells that all bytes are there."""
        self._tell(END)

    def _tell(self, line: bytes) -> None:
        if not self.over and not self._news.is_closing():
            self._news.write(line)

    async def verdict(self) -> RowsFound:
        """Waits, bounded, for what was found. Raises DatasetError."""
        try:
            async with asyncio.timeout(self._seconds + self._num_bytes * _SECONDS_PER_BYTE):
                verdict = await asyncio.shield(self._answer)
        except TimeoutError:
            raise _damaged(
                "The rows could not be checked in time. The file is damaged, or its rows are far from what rows to "
                "train on are. Write it again, in smaller parts, and upload those."
            ) from None
        return _found(verdict)

    async def close(self) -> None:
        """Ends the process, whatever it is doing. Repeatable."""
        self._given_up = not self.over
        with suppress(ProcessLookupError):
            self._process.kill()
        await asyncio.wait([self._answer])
        self._news.close()

    async def _read(self) -> Verdict:
        assert self._process.stdout is not None
        line = await self._process.stdout.readline()
        code = await self._process.wait()
        if code == 0 and line.endswith(b"\n"):
            return Verdict.from_line(line)
        if not self._given_up:
            logging.getLogger(__name__).warning("the check of rows ended with code %d", code)
        return Verdict(
            "damaged",
            cause="The rows could not be read: the process that checks them died over them, or needed more memory than "
            "it may have. The file is damaged, or a part of it (a row, a row group, a batch) is too large. Write it "
            "again in smaller parts and upload that.",
        )


def _found(verdict: Verdict) -> RowsFound:
    match verdict.outcome:
        case "good":
            return RowsFound(verdict.num_rows, verdict.columns)
        case "bad_rows":
            raise _bad_rows(verdict)
        case "damaged":
            raise _damaged(verdict.cause)
        case "empty":
            raise DatasetError(ErrorReason.ERROR_REASON_DATASET_EMPTY, verdict.cause)


def _bad_rows(verdict: Verdict) -> DatasetError:
    bad = verdict.bad_rows
    many = "20 rows or more" if len(bad) == MAX_BAD_ROWS else f"{len(bad)} row{'s' if len(bad) > 1 else ''}"
    return DatasetError(
        ErrorReason.ERROR_REASON_DATASET_ROW,
        f"{many} cannot be used; the first is row {bad[0].number}: {bad[0].cause}. Mend or remove what is named and "
        "upload again.",
        metadata={"row": str(bad[0].number)},
        violations=[FieldViolation(f"rows[{each.number}]", each.cause) for each in bad],
    )


def _damaged(cause: str) -> DatasetError:
    return DatasetError(ErrorReason.ERROR_REASON_DATASET_DAMAGED, cause)


def _environment(environ: Mapping[str, str]) -> dict[str, str]:
    kept = {name: environ[name] for name in _KEPT if name in environ}
    if "PYTHONPATH" in kept:
        # The process has another working directory.
        parts = [str(Path(part).absolute()) for part in kept["PYTHONPATH"].split(os.pathsep) if part]
        kept["PYTHONPATH"] = os.pathsep.join(parts)
    return {**kept, **_ALWAYS}
