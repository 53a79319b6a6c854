"""The audit log: JSON lines that say who made each call, on what, and how it ended; no contents, no secrets."""

import json
import secrets
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import structlog

from unslothd.v1.server_info_pb2 import Caller as CallerMessage
from unslothd.v1.server_info_pb2 import Scope
from unslothd_server.access.callers import Caller, anonymous
from unslothd_server.access.turned_over_file import TurnedOverFile

log = structlog.get_logger()

_FLOOD = "TOO_MANY_REQUESTS"
_encode = json.JSONEncoder(ensure_ascii=False).encode  # json.dumps makes an encoder for every line
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
        call_id: What its lines in the logs are found by; the caller is told.
    """

    rpc: str
    address: str
    caller: Caller = NOBODY
    ids: dict[str, str] = field(default_factory=dict[str, str])
    code: str = "OK"
    reason: str = ""
    ms: float = 0.0
    call_id: str = field(default_factory=lambda: secrets.token_hex(6))


class AuditLog:
    """Appends lines to a file that is turned over at a size; mode 0600. A disk that takes no more stops no call.

    Args:
        path: The file; older ones are PATH.1, PATH.2 and so on.
        max_bytes: Size at which it is turned over.
        files: Most older files.
    """

    def __init__(self, path: Path, max_bytes: int, files: int) -> None:
        self._file = TurnedOverFile(path, max_bytes, files)
        self._lost_lines = 0
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
        line = _line({"time": datetime.now(UTC).isoformat(timespec="milliseconds"), **content})
        if self._lost_lines:
            line = _line({"lost_lines": self._lost_lines}) + line
        try:
            self._file.append(line)
        except OSError as error:
            if not self._lost_lines:
                log.error("the audit log cannot be written; calls go on", error=str(error))  # noqa: TRY400 - it says all
            self._lost_lines += 1
        else:
            self._lost_lines = 0

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
        self._file.close()


def calls_of_tokens(path: Path) -> tuple[datetime | None, dict[str, datetime]]:
    """Reads back who has called; lines that cannot be read are passed over.

    Args:
        path: As of the log that wrote it.

    Returns:
        Time of the oldest line of all files, None = there is none; and of the newest call of each token, by its name.

    Raises:
        OSError: A file cannot be read.
    """
    oldest: datetime | None = None
    newest: dict[str, datetime] = {}
    for file in (path, *path.parent.glob(f"{path.name}.[0-9]*")):
        with suppress(FileNotFoundError), file.open("rb") as lines:  # the server may turn them over meanwhile
            for line in lines:
                with suppress(ValueError, KeyError, TypeError):
                    content = json.loads(line)
                    when = datetime.fromisoformat(content["time"])
                    oldest = min(oldest or when, when)
                    if content["kind"] == "token":
                        newest[content["caller"]] = max(newest.get(content["caller"], when), when)
    return oldest, newest


def _who_and_what(record: CallRecord) -> dict[str, object]:
    kind = CallerMessage.Kind.Name(record.caller.kind).removeprefix("KIND_").lower()
    return {
        "call_id": record.call_id,
        "caller": record.caller.name,
        "kind": kind,
        "address": record.address,
        "rpc": record.rpc,
        **record.ids,
    }


def _line(content: Mapping[str, object]) -> bytes:
    return _encode(content).encode() + b"\n"
