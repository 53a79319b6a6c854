"""What people and programs are told about a worker that ended: one sentence, figures, and the end of its log."""

import re
import signal
from pathlib import Path

from unslothd.v1.error_reason_pb2 import ErrorReason
from unslothd_server.app.worker_exit import WorkerExit
from unslothd_server.errors import AbortedError
from unslothd_server.worker.exit_record import ExitRecord

# The text travels in HTTP/2 trailers twice, once percent-encoded; together they must stay below 8 KiB.
MAX_TAIL_BYTES = 1500
MAX_TAIL_LINES = 15

_READ_BYTES = 16384
_CONTROL = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]|[\x00-\x08\x0b-\x1f\x7f]")
_SECRETS = (
    re.compile(r"\b(hf_|sk-|ghp_|github_pat_|glpat-|xox[abp]-|AKIA)[A-Za-z0-9_-]{8,}"),
    re.compile(r"(?i)\b(bearer\s+)[A-Za-z0-9._~+/=-]{8,}"),
    re.compile(r"(?i)\b([a-z_]*(?:token|password|secret|api_?key)['\"]?\s*[=:]\s*['\"]?)[^\s'\",]{4,}"),
    re.compile(r"(://[^/\s:@]*:)[^/\s@]+(?=@)"),
)


def read_tail(log: Path) -> str:
    """Returns the last lines of a log, made safe to show: bounded, secrets masked, no terminal control codes."""
    try:
        with log.open("rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - _READ_BYTES))
            data = file.read()
    except FileNotFoundError:
        return ""
    # Of a progress bar that was drawn over and over, only the last drawing.
    drawn = [line.rstrip("\r").rpartition("\r")[2] for line in data.decode(errors="replace").split("\n")]
    shown = [line.rstrip() for line in mask_secrets(_CONTROL.sub("", "\n".join(drawn))).split("\n")]
    lines = [line for line in shown if line]
    crash = _crash(lines)
    if crash:
        return "\n".join(crash).encode()[:MAX_TAIL_BYTES].decode(errors="ignore")
    return "\n".join(lines[-MAX_TAIL_LINES:]).encode()[-MAX_TAIL_BYTES:].decode(errors="ignore")


def mask_secrets(text: str) -> str:
    """Returns the text with whatever looks like a token or a password replaced by ***."""
    for pattern in _SECRETS:
        text = pattern.sub(r"\1***", text)
    return text


def worker_exit(returncode: int | None, record: ExitRecord | None, log: Path, *, asked: bool) -> WorkerExit:
    """Puts together what is known.

    Args:
        returncode: As subprocess gives it, negative for a signal; None when the process was not our child.
        record: What the worker wrote, if it ended in order.
        log: Its log.
        asked: True when we ended it ourselves.
    """
    if returncode is None and record is not None:
        returncode = record.exit_code
    by_signal = returncode is not None and returncode < 0
    return WorkerExit(
        exit_code=None if by_signal else returncode,
        signal=_signal_name(-returncode) if by_signal and returncode is not None else None,
        log_tail=read_tail(log),
        asked=asked,
    )


def unresponsive(model_id: str, doing: str, waited_s: float) -> AbortedError:
    """Returns the error of a call that a living worker did not answer in time."""
    return AbortedError(
        ErrorReason.ERROR_REASON_WORKER_UNRESPONSIVE,
        f"The worker of model '{model_id}' did not answer within {waited_s:g} s while {doing}. It is alive: try again, "
        "or unload the model.",
        metadata={"model_id": model_id},
    )


def _crash(lines: list[str]) -> list[str]:
    """Returns the head of Python's report of a crash: the stacks of all the other threads would push it out."""
    fatal = next((index for index, line in enumerate(lines) if line.startswith("Fatal Python error:")), None)
    if fatal is None:
        return []
    current = next(
        (index for index in range(fatal, len(lines)) if lines[index].startswith("Current thread")), fatal + 1
    )
    return [*lines[max(0, fatal - 2) : fatal + 1], *lines[current : current + MAX_TAIL_LINES - 3]]


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
