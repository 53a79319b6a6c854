"""The servers of all cases, and the table of what passed."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from conformance.languages import LANGUAGES
from support.running_server import RunningServer, a_model
from support.secure_server import SecureServer

_MARKS = {"passed": "✓", "failed": "✗", "skipped": "–"}
_outcomes: dict[str, dict[str, str]] = {}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--conformance-table", type=Path, help="write the table language × case to this Markdown file")
    parser.addoption("--language", choices=sorted(LANGUAGES), help="run the cases of this language only")


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    with RunningServer(tmp_path_factory.mktemp("conformance"), fake_workers=True) as running:
        a_model(running, "tiny", token_seconds=0.01)
        yield running


@pytest.fixture(scope="session")
def secure_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SecureServer]:
    with SecureServer(tmp_path_factory.mktemp("secure")) as running:
        a_model(running, "tiny", token_seconds=0.01)
        yield running


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    place = dict(report.user_properties)
    if "case" in place and (report.when == "call" or report.outcome != "passed"):
        _outcomes.setdefault(str(place["case"]), {})[str(place["language"])] = _MARKS[report.outcome]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if not _outcomes:
        return
    names = [name for name in LANGUAGES if any(name in row for row in _outcomes.values())]
    lines = [f"| Case | {' | '.join(names)} |", "| --- |" + " --- |" * len(names)]
    lines += [f"| {case} | {' | '.join(row.get(name, '') for name in names)} |" for case, row in _outcomes.items()]
    path = config.getoption("--conformance-table")
    if path is not None:
        path.write_text("\n".join(lines) + "\n")
    terminalreporter.write_line("\n".join(lines))
