"""What `serve --check` and doctor say of metrics and traces."""

from pathlib import Path

import pytest

from unslothd_server.checks.finding import Finding, Level
from unslothd_server.checks.monitoring import monitoring_findings
from unslothd_server.config import Settings

ENDPOINT = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"}


def found(home: Path, environ: dict[str, str] | None = None, **settings: object) -> dict[str, Finding]:
    checked = Settings.model_validate({"home": home, **settings})
    return {each.name: each for each in monitoring_findings(checked, environ or {})}


def test_what_is_not_asked_for_is_not_spoken_of(tmp_path: Path):
    assert found(tmp_path) == {}


@pytest.mark.parametrize("listen", ["9464", "127.0.0.1:9464", "[::1]:9464", "localhost:9464"])
def test_metrics_on_the_loopback_are_fine(tmp_path: Path, listen: str):
    assert found(tmp_path, metrics_listen=listen)["metrics"].level is Level.OK


@pytest.mark.parametrize("listen", ["0.0.0.0:9464", "[::]:9464", "gpu-host:9464"])
def test_metrics_that_other_hosts_can_read_are_told(tmp_path: Path, listen: str):
    metrics = found(tmp_path, metrics_listen=listen)["metrics"]
    assert metrics.level is Level.WARNING
    assert f"whoever reaches {listen} can read them, without TLS or a token" in metrics.text
    assert "firewall" in metrics.mend


@pytest.mark.parametrize("protocol", ["grpc", "http/protobuf"])
def test_traces_that_can_be_sent_are_told_with_their_protocol(tmp_path: Path, protocol: str):
    traces = found(tmp_path, {**ENDPOINT, "OTEL_EXPORTER_OTLP_PROTOCOL": protocol})["traces"]
    assert (traces.level, traces.text) == (Level.OK, f"each call is a span, sent by {protocol}")


def test_traces_that_cannot_be_sent_are_told_with_what_to_set_instead(tmp_path: Path):
    traces = found(tmp_path, {**ENDPOINT, "OTEL_EXPORTER_OTLP_PROTOCOL": "http/json"})["traces"]
    assert traces.level is Level.WARNING
    assert traces.text == "none will be sent: OTEL_EXPORTER_OTLP_PROTOCOL=http/json is not supported"
    assert traces.mend == "Set it to grpc or http/protobuf."
