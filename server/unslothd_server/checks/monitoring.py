"""What watches the server: who can read its metrics, and whether the traces that are asked for can be sent."""

from collections.abc import Iterator, Mapping

from unslothd_server.checks.finding import Finding, ok, warning
from unslothd_server.config import Settings, is_loopback, split_address
from unslothd_server.trace_exporters import TracesError, make_exporter, wanted_exporter


def monitoring_findings(settings: Settings, environ: Mapping[str, str]) -> Iterator[Finding]:
    """What there is to say of what is asked for; nothing is sent.

    Args:
        settings: Checked settings.
        environ: The server's environment, which asks for traces or not.
    """
    if settings.metrics_listen:
        yield _metrics(settings.metrics_listen)
    try:
        exporter = make_exporter(environ)
    except TracesError as error:
        yield warning("traces", f"none will be sent: {error.cause}", error.mend)
        return
    if exporter is not None:
        exporter.shutdown()
        yield ok("traces", f"each call is a span, sent by {wanted_exporter(environ)}")


def _metrics(listen: str) -> Finding:
    if is_loopback(split_address(listen)[0]):
        return ok("metrics", f"this host alone can read them at {listen}")
    text = f"whoever reaches {listen} can read them, without TLS or a token"
    mend = "Use --metrics-listen with a loopback address, or let a firewall pass Prometheus alone: docs/monitoring.md."
    return warning("metrics", text, mend)
