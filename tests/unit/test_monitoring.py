"""Whether the variables of OpenTelemetry ask for traces."""

import pytest

from unslothd_server.monitoring import wanted_exporter


@pytest.mark.parametrize(
    ("environ", "wanted"),
    [
        ({}, ""),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4318"}, "otlp"),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://collector:4318/v1/traces"}, "otlp"),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4318", "OTEL_TRACES_EXPORTER": "none"}, ""),
        ({"OTEL_TRACES_EXPORTER": "console"}, "console"),
        ({"OTEL_TRACES_EXPORTER": "otlp", "OTEL_SDK_DISABLED": "true"}, ""),
    ],
)
def test_an_endpoint_or_an_exporter_asks_for_traces_unless_they_are_switched_off(environ: dict[str, str], wanted: str):
    assert wanted_exporter(environ) == wanted
