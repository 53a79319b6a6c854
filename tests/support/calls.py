"""Calls as tests make them: plain stubs, short arguments, errors taken apart."""

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import grpc
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from unslothd.v1 import service_pb2 as pb
from unslothd.v1.dataset_pb2 import DatasetSource, InlineRows
from unslothd.v1.model_pb2 import Model
from unslothd.v1.service_pb2_grpc import UnslothServiceStub
from unslothd.v1.training_event_pb2 import TrainingEvent
from unslothd.v1.training_pb2 import TrainingConfig

CALL_SECONDS = 120.0


@dataclass
class CallError:
    """A failed call, taken apart.

    Args:
        code: Name of the gRPC code.
        reason: ErrorInfo.reason; empty when there is no ErrorInfo of ours.
        message: Text of the status.
        metadata: ErrorInfo.metadata.
        fields: Fields named by BadRequest.
    """

    code: str
    reason: str
    message: str
    metadata: dict[str, str]
    fields: list[str]


def error_of(call: Callable[[], Any]) -> CallError:
    """Makes a call that must fail, reading a stream to its end."""
    try:
        result = call()
        if isinstance(result, Iterator):
            for _ in result:
                pass
    except grpc.RpcError as error:
        return taken_apart(error)
    raise AssertionError("the call succeeded")


def taken_apart(error: grpc.RpcError) -> CallError:
    """Returns what a failed call says."""
    status = rpc_status.from_call(error)
    info, bad_request = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
    for detail in status.details if status is not None else ():
        detail.Unpack(info)
        detail.Unpack(bad_request)
    reason = info.reason if info.domain == "unslothd" else ""
    fields = [each.field for each in bad_request.field_violations]
    return CallError(error.code().name, reason, error.details(), dict(info.metadata), fields)


def load(stub: UnslothServiceStub, model_name: str, **fields: Any) -> Model:
    """Loads a model and returns it."""
    request = pb.LoadModelRequest(model_name=model_name, **fields)
    *_, last = stub.LoadModel(request, timeout=CALL_SECONDS)
    assert last.WhichOneof("result") == "model"
    return last.model


def prepare(stub: UnslothServiceStub, model_id: str, config: TrainingConfig | None = None, **fields: Any) -> Model:
    """Prepares a model and returns it."""
    request = pb.PrepareForTrainingRequest(model_id=model_id, training_config=config, **fields)
    return stub.PrepareForTraining(request, timeout=CALL_SECONDS).model


def inline(rows: Iterable[dict[str, Any] | str]) -> DatasetSource:
    """Rows inside a request: dicts, or JSON lines as they are."""
    lines = [row.rstrip("\n") if isinstance(row, str) else json.dumps(row) for row in rows]
    return DatasetSource(inline=InlineRows(data="\n".join(lines).encode()))


def train(stub: UnslothServiceStub, model_id: str, rows: DatasetSource, **fields: Any) -> Iterator[TrainingEvent]:
    """Trains; yields the events that are kept in the log."""
    request = pb.TrainRequest(model_id=model_id, train_dataset=rows, **fields)
    return _events(stub.Train(request, timeout=CALL_SECONDS))


def watch(stub: UnslothServiceStub, training_id: str, after_sequence: int = 0) -> Iterator[TrainingEvent]:
    """Watches a training; yields the events that are kept in the log."""
    request = pb.WatchTrainingRequest(training_id=training_id, after_sequence=after_sequence)
    return _events(stub.WatchTraining(request, timeout=CALL_SECONDS))


def _events(responses: Iterable[Any]) -> Iterator[TrainingEvent]:
    for response in responses:
        if response.event.sequence:
            yield response.event


@contextmanager
def prepared_model(
    stub: UnslothServiceStub, model_name: str, config: TrainingConfig | None = None, **fields: Any
) -> Iterator[Model]:
    """A loaded and prepared model that is unloaded at the end, whatever runs on it."""
    model = load(stub, model_name)
    try:
        yield prepare(stub, model.model_id, config, **fields)
    finally:
        request = pb.UnloadModelRequest(model_id=model.model_id, force=True)
        stub.UnloadModel(request, timeout=CALL_SECONDS)
