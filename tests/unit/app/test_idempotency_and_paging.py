"""Retries that attach, and pages that do not shift."""

import pytest

from unslothd.v1.service_pb2 import TrainRequest
from unslothd_server.app.idempotency import SeenRequests, content_digest
from unslothd_server.app.paging import page
from unslothd_server.errors import AlreadyExistsError, InvalidFieldsError


def request(request_id: str, **labels: str) -> TrainRequest:
    return TrainRequest(model_id="m", request_id=request_id, labels=labels)


def test_the_digest_looks_at_the_content_and_not_at_the_id():
    assert content_digest(request("a", x="1", y="2")) == content_digest(request("b", y="2", x="1"))
    assert content_digest(request("a", x="1")) != content_digest(request("a", x="2"))


def test_an_equal_retry_finds_what_the_first_call_became():
    seen = SeenRequests[str]()
    seen.remember("id", "digest", "run")
    assert seen.find("id", "digest") == "run"


def test_the_same_id_with_other_content_is_refused():
    seen = SeenRequests[str]()
    seen.remember("id", "digest", "run")
    with pytest.raises(AlreadyExistsError) as caught:
        seen.find("id", "other")
    assert caught.value.reason_name == "REQUEST_ID_REUSED"


def test_calls_without_an_id_are_never_the_same():
    seen = SeenRequests[str]()
    seen.remember("", "digest", "run")
    assert seen.find("", "digest") is None


def test_a_forgotten_id_can_be_used_anew():
    seen = SeenRequests[str]()
    seen.remember("id", "digest", "run")
    seen.forget("id")
    assert seen.find("id", "other") is None


def test_pages_follow_each_other_without_gap_or_repeat_also_when_entries_come_in_between():
    first, token = page(["d", "c", "b", "a"], 2, "")
    second, end = page(["e", "d", "c", "b", "a"], 2, token)
    assert (first, second, end) == (["d", "c"], ["b", "a"], "")


def test_a_token_that_was_not_made_here_is_a_wrong_field():
    with pytest.raises(InvalidFieldsError) as caught:
        page(["a"], 1, "%%%")
    assert caught.value.violations[0].field == "page_token"
