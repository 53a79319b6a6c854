"""What doctor says of the installed packages."""

import json
import sys

from unslothd_server.checks.finding import Level
from unslothd_server.checks.packages import engine_findings, pin_findings

TOLD = {"versions": {"unsloth": "2026.10.9", "torch": "2.14.1"}, "seconds": 12.3, "cuda": "13.0", "gpus": 0}


def program(code: str) -> tuple[str, ...]:
    return (sys.executable, "-c", code)


def test_what_is_installed_here_fits_what_the_server_asks_for():
    assert [finding.level for finding in pin_findings()] == [Level.OK]


def test_a_missing_and_an_unfit_package_are_problems_with_the_command_that_mends_them():
    found = list(
        pin_findings(["grpcio>=1", "no-such-package>=2", 'protobuf<2; extra == "server"', 'grpcio<1; extra == "x"'])
    )
    assert [finding.level for finding in found] == [Level.PROBLEM, Level.PROBLEM]
    assert [finding.mend for finding in found] == ["pip install 'no-such-package>=2'", "pip install 'protobuf<2'"]


def test_an_engine_that_can_be_imported_tells_its_versions():
    (finding,) = engine_findings(0, 60, program(f"print('banner'); print({json.dumps(TOLD)!r})"))
    assert finding.text == "imported in 12 s: unsloth 2026.10.9, torch 2.14.1"


def test_a_torch_that_sees_fewer_gpus_than_the_driver_is_a_problem():
    engine, torch = engine_findings(2, 60, program(f"print({json.dumps(TOLD)!r})"))
    assert (engine.level, torch.level) == (Level.OK, Level.PROBLEM)
    assert torch.text == "sees 0 of 2 GPUs; it was built for CUDA 13.0"


def test_an_engine_that_cannot_be_imported_is_a_problem_that_says_why():
    (finding,) = engine_findings(0, 60, program("raise ImportError('libcudart.so.13 is missing')"))
    assert finding.level is Level.PROBLEM
    assert "libcudart.so.13 is missing" in finding.text


def test_an_import_that_hangs_is_given_up():
    (finding,) = engine_findings(0, 0.5, program("import signal; signal.pause()"))
    assert finding.level is Level.PROBLEM
    assert "longer than 0.5 s" in finding.text
