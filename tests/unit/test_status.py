"""Errors as statuses: one table, there and back."""

import base64
import inspect
from urllib.parse import quote

import pytest
from google.rpc import code_pb2, error_details_pb2, status_pb2

from unslothd.v1.error_reason_pb2 import ErrorReason
from unslothd_server import errors
from unslothd_server.status import CODES, fit_to_send, from_status, to_status

LEAVES = [
    each
    for _, each in inspect.getmembers(errors, inspect.isclass)
    if issubclass(each, errors.UnslothdError) and each is not errors.UnslothdError
]


def test_every_class_of_the_tree_has_a_code():
    assert set(CODES) == set(LEAVES)


def test_an_error_comes_back_as_it_went():
    error = errors.ExhaustedError(
        ErrorReason.ERROR_REASON_INSUFFICIENT_MEMORY, "too big; unload one", metadata={"needed_bytes": "7"}
    )
    back = from_status(to_status(error))
    assert type(back) is errors.ExhaustedError
    assert (back.reason_name, back.message, back.metadata) == (
        "INSUFFICIENT_MEMORY",
        "too big; unload one",
        {"needed_bytes": "7"},
    )


def test_every_wrong_field_is_in_the_bad_request():
    status = to_status(
        errors.InvalidFieldsError([errors.FieldViolation("a", "is wrong"), errors.FieldViolation("b.c", "too")])
    )
    bad_request = error_details_pb2.BadRequest()
    assert status.details[1].Unpack(bad_request)
    assert [(each.field, each.description) for each in bad_request.field_violations] == [
        ("a", "is wrong"),
        ("b.c", "too"),
    ]
    assert status.code == code_pb2.INVALID_ARGUMENT
    assert [each.field for each in from_status(status).violations] == ["a", "b.c"]


@pytest.mark.parametrize("status", [status_pb2.Status(code=5), status_pb2.Status(code=13, message="x")])
def test_a_status_of_somebody_else_is_not_ours(status: status_pb2.Status):
    assert from_status(status) is None


@pytest.mark.parametrize("letter", ["x", "é", "\u202e", "\0", "%", "\U0010ffff"])
def test_an_error_of_any_length_fits_into_the_trailers_and_keeps_its_next_step(letter: str):
    fields = [errors.FieldViolation(letter * 1000, letter * 3000) for _ in range(500)]
    long = errors.InvalidFieldsError([*fields, errors.FieldViolation("last", "is wrong. Mend it.")])
    status = fit_to_send(to_status(long))
    trailers = len(quote(status.message)) + len(base64.b64encode(status.SerializeToString()))
    assert trailers < 7500
    back = from_status(status)
    assert (back.reason_name, len(back.violations) > 0) == ("INVALID_FIELD", True)
    assert back.message.endswith("is wrong. Mend it.")


def test_an_error_that_fits_is_sent_as_it_is():
    status = to_status(errors.InvalidFieldsError([errors.FieldViolation("a", "is wrong")]))
    assert fit_to_send(status) == status
