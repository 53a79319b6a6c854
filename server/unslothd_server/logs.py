"""The server's own log on stderr: lines for people or JSON, each with the call, model and training that it is about.

What a line is about is bound once (`structlog.contextvars`), by the interceptor for a call and by a queue for a
training, and every line below has it.
"""

import contextlib
import logging
import sys
from typing import Literal, TextIO, cast

import structlog

LogFormat = Literal["auto", "console", "json"]


def set_up(log_format: LogFormat, *, verbose: bool) -> None:
    """Sends logs to stderr, those of the standard library too.

    Args:
        log_format: For people ("console") or one JSON object a line ("json"); auto = as a terminal is there or not.
        verbose: Also what is only of use when something is looked for, e.g. every call.
    """
    level = logging.DEBUG if verbose else logging.INFO
    for_people = log_format == "console" or (log_format == "auto" and sys.stderr.isatty())
    renderer = (
        structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
        if for_people
        else structlog.processors.JSONRenderer(ensure_ascii=False)
    )
    # The console shows tracebacks by itself.
    traceback: list[structlog.typing.Processor] = [] if for_people else [structlog.processors.format_exc_info]
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        *traceback,
    ]
    structlog.configure(
        processors=[*shared, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.PrintLoggerFactory(cast("TextIO", _LossyStream(sys.stderr))),
    )
    handler = logging.StreamHandler(sys.stderr)
    remove_meta = structlog.stdlib.ProcessorFormatter.remove_processors_meta
    formatter = structlog.stdlib.ProcessorFormatter(
        processors=[remove_meta, renderer], foreign_pre_chain=[structlog.stdlib.ExtraAdder(), *shared]
    )
    handler.setFormatter(formatter)
    logging.basicConfig(level=logging.INFO, handlers=[handler])


class _LossyStream:
    """Passes text on and drops what is not taken: a log on a full disk must not end what it tells of."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        with contextlib.suppress(OSError):
            self._stream.write(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.flush()
