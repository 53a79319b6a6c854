"""Every case with every language."""

from pathlib import Path

import pytest

from conformance.languages import LANGUAGES
from conformance.runner import Data, all_cases, run
from support.running_server import RunningServer


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("case", all_cases(), ids=lambda case: case["name"])
def test_the_client_does_what_the_case_says(
    case: Data,
    language: str,
    tmp_path: Path,
    record_property,
    request: pytest.FixtureRequest,
) -> None:
    wanted = request.config.getoption("--language")
    if wanted not in {None, language}:
        pytest.skip(f"only {wanted} was asked for")
    record_property("case", case["name"])
    record_property("language", language)
    LANGUAGES[language].built()
    server: RunningServer = request.getfixturevalue("secure_server" if case.get("tls") == "real" else "server")
    run(case, LANGUAGES[language], server, tmp_path)
