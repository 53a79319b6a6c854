"""What the variables of OpenTelemetry ask for, and what is told when it cannot be had."""

from pathlib import Path

import pytest

from unslothd_server.trace_exporters import TracesError, make_exporter, wanted_exporter

ENDPOINT = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4317"}


@pytest.mark.parametrize(
    ("environ", "wanted"),
    [
        ({}, ""),
        (ENDPOINT, "http/protobuf"),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://collector:4318/v1/traces"}, "http/protobuf"),
        ({**ENDPOINT, "OTEL_TRACES_EXPORTER": "none"}, ""),
        ({"OTEL_TRACES_EXPORTER": "console"}, "console"),
        ({"OTEL_TRACES_EXPORTER": "otlp"}, "http/protobuf"),
        ({"OTEL_TRACES_EXPORTER": "otlp", "OTEL_SDK_DISABLED": "true"}, ""),
    ],
)
def test_an_endpoint_or_an_exporter_asks_for_traces_unless_they_are_switched_off(environ: dict[str, str], wanted: str):
    assert wanted_exporter(environ) == wanted


@pytest.mark.parametrize(
    ("general", "of_traces", "wanted"),
    [
        ("grpc", "", "grpc"),
        ("http/protobuf", "", "http/protobuf"),
        ("", "grpc", "grpc"),
        ("http/protobuf", "grpc", "grpc"),
        ("grpc", "http/protobuf", "http/protobuf"),
        ("http/json", "grpc", "grpc"),
    ],
)
def test_the_protocol_is_that_of_traces_else_the_general_one(general: str, of_traces: str, wanted: str):
    protocols = {"OTEL_EXPORTER_OTLP_PROTOCOL": general, "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": of_traces}
    assert wanted_exporter({**ENDPOINT, **protocols}) == wanted


@pytest.mark.parametrize(
    ("name", "value", "instead"),
    [
        ("OTEL_TRACES_EXPORTER", "zipkin", "otlp, console or none"),
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "http/json", "grpc or http/protobuf"),
        ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "GRPC", "grpc or http/protobuf"),
    ],
)
def test_what_is_not_supported_is_told_with_what_to_set_instead(name: str, value: str, instead: str):
    with pytest.raises(TracesError, match=f"^{name}={value} is not supported. Set it to {instead}"):
        wanted_exporter({**ENDPOINT, name: value})


def test_nothing_is_asked_for_where_traces_are_off_whatever_the_protocol():
    assert wanted_exporter({"OTEL_EXPORTER_OTLP_PROTOCOL": "http/json"}) == ""


@pytest.mark.parametrize("protocol", ["grpc", "http/protobuf"])
def test_a_certificate_that_cannot_be_read_is_told_before_the_first_span(protocol: str, tmp_path: Path):
    missing = tmp_path / "ca.pem"
    environ = {"OTEL_EXPORTER_OTLP_PROTOCOL": protocol, "OTEL_EXPORTER_OTLP_CERTIFICATE": str(missing)}
    with pytest.raises(TracesError, match=f"OTEL_EXPORTER_OTLP_CERTIFICATE={missing} cannot be read"):
        make_exporter({**ENDPOINT, **environ})


@pytest.mark.parametrize(
    ("name", "value"), [("OTEL_EXPORTER_OTLP_COMPRESSION", "lz4"), ("OTEL_EXPORTER_OTLP_TIMEOUT", "soon")]
)
def test_a_value_that_the_exporter_over_grpc_does_not_take_is_told(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
):
    monkeypatch.setenv(name, value)
    with pytest.raises(TracesError, match=value):
        make_exporter({**ENDPOINT, "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"})
