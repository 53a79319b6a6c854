"""Limits a caller: so many calls a second, so many at once, so many streams; each caller for itself."""

import dataclasses

import pytest

from support.clock import Clock
from unslothd.v1.server_info_pb2 import Scope
from unslothd_server.access import limits as module
from unslothd_server.access.callers import anonymous, of_certificate
from unslothd_server.access.limits import CallerLimits, CallLimits
from unslothd_server.errors import ExhaustedError

LIMITS = CallLimits(
    max_message_bytes=1,
    max_inline_bytes=1,
    max_streams=2,
    max_requests_per_second=10.0,
    max_request_burst=3,
    max_deadline_seconds=1.0,
    upload_idle_seconds=1.0,
    min_upload_bytes_per_second=1.0,
)
ALICE, BOB = of_certificate("alice", Scope.SCOPE_READ), of_certificate("bob", Scope.SCOPE_READ)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def callers(clock: Clock) -> CallerLimits:
    return CallerLimits(LIMITS, clock)


def taken(callers: CallerLimits, most: int = 100) -> int:
    """How many calls are taken at once."""
    for number in range(most):
        try:
            callers.take_request(ALICE)
        except ExhaustedError:
            return number
    return most


def test_a_burst_is_taken_and_then_the_rate(callers: CallerLimits, clock: Clock):
    assert taken(callers) == 3
    clock.now += 0.1
    assert taken(callers) == 1
    clock.now += 0.2
    assert taken(callers) == 2
    clock.now += 60
    assert taken(callers) == 3


def test_the_next_call_is_taken_after_the_time_that_the_refusal_tells(callers: CallerLimits, clock: Clock):
    taken(callers)
    clock.now += 0.03
    with pytest.raises(ExhaustedError) as caught:
        callers.take_request(ALICE)
    assert caught.value.reason_name == "TOO_MANY_REQUESTS"
    assert caught.value.retry_seconds == pytest.approx(0.07, abs=0.001)
    clock.now += caught.value.retry_seconds
    callers.take_request(ALICE)


def test_refused_calls_cost_the_caller_nothing(callers: CallerLimits, clock: Clock):
    taken(callers)
    for _ in range(50):
        with pytest.raises(ExhaustedError):
            callers.take_request(ALICE)
    clock.now += 0.1
    assert taken(callers) == 1


def test_a_caller_does_not_use_up_what_is_anothers(callers: CallerLimits):
    taken(callers)
    callers.take_request(BOB)
    callers.take_request(anonymous("alice", Scope.SCOPE_ADMIN))  # of that name only


def test_a_stream_counts_while_it_is_open(callers: CallerLimits):
    with callers.stream(ALICE), callers.stream(ALICE):
        with pytest.raises(ExhaustedError) as caught, callers.stream(ALICE):
            pass
        assert caught.value.reason_name == "TOO_MANY_STREAMS"
        assert caught.value.retry_seconds > 0
        with callers.stream(BOB):
            pass
    with callers.stream(ALICE), callers.stream(ALICE):
        pass


def test_a_stream_that_fails_is_closed_too(callers: CallerLimits):
    for _ in range(5):
        with pytest.raises(KeyError), callers.stream(ALICE):
            raise KeyError


def test_many_addresses_take_no_more_memory_and_forget_no_open_stream(
    callers: CallerLimits, clock: Clock, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(module, "_MOST_IDLE_ENTRIES", 10)
    with callers.stream(ALICE), callers.stream(ALICE):
        for number in range(100):
            clock.now += 1
            callers.take_request(anonymous(f"10.0.0.{number}", Scope.SCOPE_ADMIN))
        assert len(callers._usage) <= 10
        with pytest.raises(ExhaustedError), callers.stream(ALICE):
            pass


def test_what_does_not_hold_for_a_caller_is_not_told_to_it():
    told = LIMITS.for_caller(ALICE)
    assert (told.max_streams, told.max_requests_per_second, told.max_request_burst) == (2, 10.0, 3)
    told = LIMITS.for_caller(anonymous("local", Scope.SCOPE_ADMIN))
    assert (told.max_streams, told.max_requests_per_second, told.max_request_burst) == (0, 0, 0)
    assert {field.name for field in dataclasses.fields(LIMITS)} <= set(told.DESCRIPTOR.fields_by_name)
