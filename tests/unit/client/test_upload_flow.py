"""The way of an upload without any connection: what is known is not sent, what was lost is sent again."""

import hashlib
from collections.abc import Iterator
from typing import Any

import grpc
import pytest

from unslothd import _operations, errors
from unslothd._retry import Peer, Retry
from unslothd._upload import upload
from unslothd.v1 import dataset_pb2, service_pb2

DATA = [b"one", b"two"]
SHA256 = hashlib.sha256(b"onetwo").hexdigest()
STORED = dataset_pb2.Dataset(dataset_id=f"sha256:{SHA256}", format=dataset_pb2.DATA_FORMAT_CSV)


class Source:
    data_format = dataset_pb2.DATA_FORMAT_CSV

    def blocks(self) -> Iterator[bytes]:
        yield from DATA


class Broken(Source):
    def __init__(self) -> None:
        self.reads = 0

    def blocks(self) -> Iterator[bytes]:
        self.reads += 1
        yield DATA[0]
        if self.reads > 1:
            raise OSError("the disk is gone")
        yield DATA[1]


def started(source: Any, on_progress: Any = None) -> tuple[_operations.Flow[Any, Any], _operations.Unary]:
    """A flow up to its question whether the server has the bytes."""
    flow = upload(source, "a name", 60.0, Retry(Peer(heard=True), 60.0), on_progress)
    measuring = next(flow)
    assert isinstance(measuring, _operations.Blocking)
    question = flow.send(measuring.call())
    assert isinstance(question, _operations.Unary)
    assert question.request == service_pb2.GetDatasetRequest(dataset_id=STORED.dataset_id)
    return flow, question


def unknown() -> errors.NotFound:
    return errors.NotFound("no such dataset", code=grpc.StatusCode.NOT_FOUND, reason="DATASET_NOT_FOUND")


def lost() -> errors.Unavailable:
    return errors.Unavailable("socket closed", code=grpc.StatusCode.UNAVAILABLE)


def test_bytes_that_the_server_has_are_not_sent():
    flow, _ = started(Source())
    with pytest.raises(StopIteration) as ended:
        flow.send(service_pb2.GetDatasetResponse(dataset=STORED))
    assert ended.value.value == STORED


def test_a_header_comes_first_then_every_block_in_order():
    flow, _ = started(Source())
    sending = flow.throw(unknown())
    assert isinstance(sending, _operations.SendStream)
    header, *chunks = sending.requests
    assert header.header == service_pb2.UploadDatasetHeader(
        name="a name", format=dataset_pb2.DATA_FORMAT_CSV, sha256=SHA256
    )
    assert [each.chunk for each in chunks] == DATA
    with pytest.raises(StopIteration) as ended:
        flow.send(service_pb2.UploadDatasetResponse(dataset=STORED))
    assert ended.value.value == STORED


def test_after_a_lost_connection_everything_is_sent_again():
    flow, _ = started(Source())
    first = flow.throw(unknown())
    list(first.requests)
    assert isinstance(flow.throw(lost()), _operations.Sleep)
    again = flow.send(None)
    assert isinstance(again, _operations.SendStream)
    assert [each.chunk for each in again.requests][1:] == DATA


def test_an_answer_of_the_server_is_not_tried_again():
    flow, _ = started(Source())
    flow.throw(unknown())
    refused = errors.InvalidRequest("row 1", reason="DATASET_ROW")
    with pytest.raises(errors.InvalidRequest) as caught:
        flow.throw(refused)
    assert caught.value is refused


def test_a_source_that_fails_while_it_is_sent_ends_the_upload_with_its_error():
    flow, _ = started(Broken())
    sending = flow.throw(unknown())
    assert list(sending.requests)[2:] == [service_pb2.UploadDatasetRequest()]  # which the server refuses
    with pytest.raises(OSError, match="the disk is gone"):
        flow.throw(errors.InvalidRequest("part: one is needed", reason="INVALID_FIELD"))
