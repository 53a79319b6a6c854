"""The exporter of traces that the standard variables of OpenTelemetry ask for, or why there is none.

Nothing of OpenTelemetry is imported unless they ask for traces; that needs the extra `otel`.
"""

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter

_DEFAULT_PROTOCOL = "http/protobuf"
_PROTOCOLS = ("grpc", _DEFAULT_PROTOCOL)
_FILES = ("CERTIFICATE", "CLIENT_CERTIFICATE", "CLIENT_KEY")


class TracesError(Exception):
    """No traces can be sent.

    Args:
        cause: What is wrong.
        mend: What to do about it.
    """

    def __init__(self, cause: str, mend: str) -> None:
        super().__init__(f"{cause}. {mend}")
        self.cause = cause
        self.mend = mend


def wanted_exporter(environ: Mapping[str, str]) -> str:
    """Returns what the variables ask for: "console", a protocol of OTLP ("grpc", "http/protobuf"), or "" for no traces.

    Raises:
        TracesError: They ask for what there is not.
    """
    if environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return ""
    _, endpoint = _of_otlp(environ, "ENDPOINT")
    exporter = environ.get("OTEL_TRACES_EXPORTER") or ("otlp" if endpoint else "none")
    if exporter == "none":
        return ""
    if exporter == "console":
        return exporter
    if exporter != "otlp":
        raise TracesError(f"OTEL_TRACES_EXPORTER={exporter} is not supported", "Set it to otlp, console or none.")
    variable, protocol = _of_otlp(environ, "PROTOCOL")
    if protocol and protocol not in _PROTOCOLS:
        raise TracesError(f"{variable}={protocol} is not supported", f"Set it to {' or '.join(_PROTOCOLS)}.")
    return protocol or _DEFAULT_PROTOCOL


def make_exporter(environ: Mapping[str, str]) -> "SpanExporter | None":
    """Makes the exporter; it connects once there are spans, and takes all else that it needs from the environment.

    Returns:
        None when no traces are asked for.

    Raises:
        TracesError: They are, and cannot be sent.
    """
    wanted = wanted_exporter(environ)
    if not wanted:
        return None
    for kind in _FILES if wanted in _PROTOCOLS else ():
        variable, file = _of_otlp(environ, kind)
        # The exporters would do without it, or say so only when the first spans are due.
        if file and not os.access(file, os.R_OK):
            raise TracesError(f"{variable}={file} cannot be read", "Let the server's user read it, or unset it.")
    try:
        return _make(wanted)
    except ModuleNotFoundError as error:
        raise TracesError(f"{error.name} is missing", "pip install 'unslothd[otel]'") from error
    except Exception as error:
        # What an exporter raises over a wrong variable is of no common kind.
        mend = "Mend or unset the variables OTEL_EXPORTER_OTLP_*."
        raise TracesError(f"The exporter cannot be made: {error}", mend) from error


def _make(wanted: str) -> "SpanExporter":
    if wanted == "console":
        from opentelemetry.sdk.trace.export import ConsoleSpanExporter

        return ConsoleSpanExporter()
    if wanted == "grpc":
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as GrpcExporter

        return GrpcExporter()
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as HttpExporter

    return HttpExporter()


def _of_otlp(environ: Mapping[str, str], kind: str) -> tuple[str, str]:
    """Returns the variable that counts and its value; the one of traces alone comes before the general one."""
    names = (f"OTEL_EXPORTER_OTLP_TRACES_{kind}", f"OTEL_EXPORTER_OTLP_{kind}")
    return next(((name, value) for name in names if (value := environ.get(name, ""))), ("", ""))
