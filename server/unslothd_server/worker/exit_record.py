"""The exit record: what a worker that ends in order leaves for whoever cannot ask the kernel for its exit code."""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

RECORD_VERSION = 1  # records without a version are of 1 too


@dataclass(frozen=True)
class ExitRecord:
    """How a worker ended itself.

    Args:
        pid: Process id that it had.
        exit_code: Exit code.
        reason: One short sentence for people.
    """

    pid: int
    exit_code: int
    reason: str


def write_exit_record(path: Path, record: ExitRecord) -> None:
    """Writes the record whole or not at all."""
    draft = path.with_suffix(".tmp")
    draft.write_text(json.dumps({"version": RECORD_VERSION, **asdict(record)}))
    draft.replace(path)


def read_exit_record(path: Path, pid: int) -> ExitRecord | None:
    """Returns the record that the process `pid` wrote; None when it wrote none."""
    try:
        fields: dict[str, Any] = json.loads(path.read_text())
        record = ExitRecord(fields["pid"], fields["exit_code"], fields["reason"])
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return record if record.pid == pid else None


def exit_now(path: Path, exit_code: int, reason: str) -> None:
    """Writes the record and ends the process without the interpreter's teardown, which can hang in CUDA or gRPC."""
    try:
        write_exit_record(path, ExitRecord(os.getpid(), exit_code, reason))
    finally:
        os._exit(exit_code)
