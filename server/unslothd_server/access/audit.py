"""The audit log: JSON lines that say who made each call, on what, and how it ended; no contents, no secrets."""

import contextlib
import json
import logging
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from io import TextIOWrapper
from logging.handlers import RotatingFileHandler
from pathlib import Path

import structlog

from unslothd.v1.server_info_pb2 import Caller as CallerMessage
from unslothd.v1.server_info_pb2 import Scope
from unslothd_server.access.callers import Caller, anonymous

log = structlog.get_logger()

_FLOOD = "TOO_MANY_REQUESTS"
NOBODY = anonymous("", Scope.SCOPE_UNSPECIFIED)


@dataclass
class CallRecord:
    """One call, filled in as it goes on.

    Args:
        rpc: Name of the RPC.
        address: Where it comes from, as gRPC names it.
        caller: Who makes it.
        ids: Ids that request and response name, e.g. {"training_id": "…"}.
        code: gRPC code that it ended with.
        reason: Reason of its error; empty = none.
        ms: How long it took, in milliseconds.
    """

    rpc: str
    address: str
    caller: Caller = NOBODY
    ids: dict[str, str] = field(default_factory=dict[str, str])
    code: str = "OK"
    reason: str = ""
    ms: float = 0.0


class AuditLog:
    """Appends lines to a file that is turned over at a size; mode 0600. A disk that takes no more stops no call.

    Args:
        path: The file; older ones are PATH.1, PATH.2 and so on.
        max_bytes: Size at which it is turned over.
        files: Most older files.
    """

    def __init__(self, path: Path, max_bytes: int, files: int) -> None:
        self._handler = _PrivateFile(path, max_bytes, files)
        self._flooding: set[str] = set()
        self._flood_since = 0.0

    def begun(self, record: CallRecord) -> None:
        """Says that a stream begins: it may last for days."""
        self._write({"event": "begun", **_who_and_what(record)})

    def ended(self, record: CallRecord) -> None:
        """Says how a call ended. Of a caller that calls too often, one refusal a second is told."""
        if record.reason == _FLOOD and self._told_lately(record.caller.name):
            return
        ending: dict[str, object] = {"code": record.code, "ms": record.ms}
        if record.reason:
            ending["reason"] = record.reason
        self._write({"event": "ended", **_who_and_what(record), **ending})

    def _write(self, content: Mapping[str, object]) -> None:
        time_now = datetime.now(UTC).isoformat(timespec="milliseconds")
        line = json.dumps({"time": time_now, **content}, ensure_ascii=False)
        self._handler.emit(logging.makeLogRecord({"msg": line}))

    def _told_lately(self, caller: str) -> bool:
        """A flood of refused calls must not push everything else out of the log."""
        now = time.monotonic()
        if now - self._flood_since > 1:
            self._flooding.clear()
            self._flood_since = now
        told = caller in self._flooding
        self._flooding.add(caller)
        return told

    def close(self) -> None:
        """Closes the file."""
        self._handler.close()


def _who_and_what(record: CallRecord) -> dict[str, object]:
    kind = CallerMessage.Kind.Name(record.caller.kind).removeprefix("KIND_").lower()
    return {"caller": record.caller.name, "kind": kind, "address": record.address, "rpc": record.rpc, **record.ids}


class _PrivateFile(RotatingFileHandler):
    """The standard library's, with tight modes; lines that a full disk refuses are counted, and told of later."""

    def __init__(self, path: Path, max_bytes: int, files: int) -> None:
        super().__init__(path, maxBytes=max_bytes, backupCount=files, encoding="utf-8", delay=True)
        self._lost = 0
        self._failed = False

    def emit(self, record: logging.LogRecord) -> None:
        """Writes a line, after one that says how many were lost before it."""
        if self._lost:
            record.msg = json.dumps({"lost_lines": self._lost}) + "\n" + record.msg
        self._failed = False
        super().emit(record)
        self._lost = self._lost + 1 if self._failed else 0

    def handleError(self, record: logging.LogRecord) -> None:
        """Goes on without the line; the file is opened anew for the next one."""
        self._failed = True
        if not self._lost:
            log.error("the audit log cannot be written; calls go on", file=self.baseFilename, exc_info=True)
        stream, self.stream = self.stream, None
        if stream is not None:
            with contextlib.suppress(OSError):
                stream.close()

    def _open(self) -> TextIOWrapper:
        torn = not _ends_a_line(Path(self.baseFilename))
        stream = open(self.baseFilename, "a", encoding="utf-8", opener=_private)  # noqa: SIM115 - the base closes it
        if torn:
            stream.write("\n")
        return stream


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _ends_a_line(path: Path) -> bool:
    """False when a full disk or a power cut left half a line."""
    with contextlib.suppress(OSError), path.open("rb") as stream:
        if stream.seek(0, os.SEEK_END):
            stream.seek(-1, os.SEEK_END)
            return stream.read(1) == b"\n"
    return True
