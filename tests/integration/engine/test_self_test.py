"""The import that doctor tries, with real Unsloth."""

from unslothd_server.checks.finding import Level
from unslothd_server.checks.packages import engine_findings


def test_doctor_imports_unsloth_in_another_process_and_tells_the_versions():
    finding = next(iter(engine_findings(gpus=0, timeout_seconds=240)))
    assert finding.level is Level.OK
    assert "unsloth 20" in finding.text
    assert "torch 2." in finding.text
