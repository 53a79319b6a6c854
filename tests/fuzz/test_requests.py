"""Twenty thousand requests of every RPC, most of them wrong: documented errors only, and a server that stays as it was.

`make fuzz` makes a million. A finding names its seed and number, which make the same request again.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from fuzz.calls import SERVICE
from fuzz.campaign import Report, run
from fuzz.documented import codes_of_reasons, documented_reasons

REQUESTS = int(os.environ.get("UNSLOTHD_TEST_FUZZ_REQUESTS", "20000"))


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Report]:
    return run(tmp_path_factory.mktemp("fuzz"), seed=1, requests=REQUESTS)


def test_every_answer_is_as_the_contract_says(report: Report):
    assert report.requests == REQUESTS
    assert not report.findings, "\n".join(report.findings)


def test_the_server_ends_in_the_ordinary_way_afterwards(report: Report):
    assert report.exit_code == 0


def test_memory_and_open_files_are_as_they_were(report: Report):
    assert report.bytes_a_request < 500
    assert report.files_after <= report.files_before + 8


def test_requests_of_every_rpc_pass_the_rules_and_break_them(report: Report):
    # Whether a training runs just when a request would pause it is chance; a refusal for its state is beyond the rules.
    answered = {rpc for rpc, code, reason in report.outcomes if code == "OK" or reason == "TRAINING_STATE"}
    refused = {rpc for rpc, _, reason in report.outcomes if reason == "INVALID_FIELD"}
    assert answered == refused == {method.name for method in SERVICE.methods}
    beyond_the_rules = sum(count for (_, _, reason), count in report.outcomes.items() if reason != "INVALID_FIELD")
    assert beyond_the_rules > REQUESTS / 2


def test_the_comments_of_the_contract_name_reasons_that_exist():
    codes = codes_of_reasons()
    documented = documented_reasons()
    assert documented.keys() == {method.name for method in SERVICE.methods}
    for reasons in documented.values():
        assert {name: codes.get(name) for name in reasons} == reasons


def test_the_source_of_what_must_not_leak_is_where_it_is_looked_for():
    assert (Path(__file__).parents[2] / "server" / "unslothd_server").is_dir()
