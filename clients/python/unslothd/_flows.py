"""The client's logic without any input or output: generators that say what to do next.

A flow yields operations (`_operations.py`); a driver (`_drive.py`) carries them out over grpc or grpc.aio and sends the
outcome back in, or throws the `UnslothdError` that came of it. So the synchronous and the asynchronous client share
every line of the logic of re-attaching, and tests can run it without a server.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.message import Message
from google.rpc.status_pb2 import Status

from unslothd import errors
from unslothd._operations import CloseStream, Emit, Flow, Next, OpenStream, Sleep, Unary
from unslothd._retry import Retry
from unslothd.v1 import dataset_pb2, generation_pb2, model_pb2, service_pb2, training_event_pb2, training_pb2

# A long log comes many events at a time; whoever keeps up gets each as it happens.
EVENTS_A_RESPONSE = 200

_LOST_CODES = {
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.UNKNOWN,
}
_FINAL_STATES = {
    training_pb2.Training.STATE_CANCELLED,
    training_pb2.Training.STATE_SUCCEEDED,
    training_pb2.Training.STATE_FAILED,
}


@dataclass(frozen=True)
class Outcome:
    """How a training ended: exactly one of the two is set."""

    metrics: training_pb2.TrainingMetrics | None = None
    error: errors.UnslothdError | None = None


@dataclass
class Cursor:
    """How far a training has been read.

    Args:
        training_id: Id of the training; empty until its first event.
        sequence: Of the last event; 0 = none.
        outcome: What that event says, if it is a terminal one. A failed or cancelled training may be brought back: then
            its log goes on, and the next event takes the outcome away.
    """

    training_id: str = ""
    sequence: int = 0
    outcome: Outcome | None = None

    def take(self, event: training_event_pb2.TrainingEvent) -> None:
        """Moves on to this event."""
        self.training_id, self.sequence, self.outcome = event.training_id, event.sequence, outcome_of(event)

    @property
    def succeeded(self) -> bool:
        """True when nothing can follow: a training that succeeded is never resumed."""
        return self.outcome is not None and self.outcome.error is None


def connection_lost(error: errors.UnslothdError) -> bool:
    """True when the way to the server broke, not the work: the same call may go on later.

    An error with a reason is the server's own answer. A broken connection has none and shows as UNAVAILABLE (socket
    closed, refused), CANCELLED or INTERNAL (RST_STREAM), or UNKNOWN (stream removed).
    """
    return error.reason == "SERVER_STOPPING" or (not error.reason and error.code in _LOST_CODES)


def unary(method: str, request: Message, timeout: float | None, retry: Retry) -> Flow[Any, Any]:
    """Makes one call and returns its response; calls again while the server is away, if `retry` allows.

    Only after UNAVAILABLE: the other ways to lose a connection leave open whether the call has been carried out.
    """
    while True:
        try:
            response = yield Unary(method, request, timeout)
        except errors.UnslothdError as error:
            if not (connection_lost(error) and error.code is grpc.StatusCode.UNAVAILABLE):
                raise
            yield Sleep(retry.next_delay(error))
        else:
            retry.heard()
            return response


def load(request: service_pb2.LoadModelRequest, retry: Retry) -> Flow[model_pb2.LoadProgress, model_pb2.Model]:
    """Emits the progress of a load and returns the model; attaches again by request_id after a lost connection."""
    while True:
        yield OpenStream("LoadModel", request)
        try:
            while (message := (yield Next())) is not None:
                retry.progress()
                if message.HasField("model"):
                    yield CloseStream()
                    return message.model
                yield Emit(message.progress)
            lost = ended_early("LoadModel")
        except errors.UnslothdError as error:
            if not connection_lost(error):
                raise
            lost = error
        yield Sleep(retry.next_delay(lost))


def train(
    request: service_pb2.TrainRequest, cursor: Cursor, retry: Retry
) -> Flow[training_event_pb2.TrainingEvent, Outcome]:
    """Starts a training, emits each of its events once, and returns how it ended.

    Until the first event arrives the same request, with the same request_id, is sent again after a lost connection;
    from then on the log is read on from the last sequence.
    """
    while cursor.sequence == 0:
        yield OpenStream("Train", request)
        lost = yield from _read(cursor, retry)
        if lost is None or not (yield from _wait(cursor, retry, lost)):
            return _known(cursor)
    return (yield from watch(cursor, retry, timeout=None))


def watch(cursor: Cursor, retry: Retry, timeout: float | None) -> Flow[training_event_pb2.TrainingEvent, Outcome]:
    """Emits each event after the cursor once and returns how the training ended.

    The end of the stream decides, not a terminal event: ResumeTraining may have brought the training back.
    """
    while True:
        request = service_pb2.WatchTrainingRequest(
            training_id=cursor.training_id, after_sequence=cursor.sequence, max_events=EVENTS_A_RESPONSE
        )
        yield OpenStream("WatchTraining", request)
        lost = yield from _read(cursor, retry)
        if lost is not None and lost.code is grpc.StatusCode.OK:
            cursor.outcome = yield from _final(cursor, retry, timeout)
            lost = None if cursor.outcome is not None else lost
        if lost is None or not (yield from _wait(cursor, retry, lost)):
            return _known(cursor)


def resume(request: service_pb2.ResumeTrainingRequest, timeout: float | None, retry: Retry) -> Flow[Any, Cursor]:
    """Goes on with a training and returns the cursor before the first event of that."""
    look = service_pb2.GetTrainingRequest(training_id=request.training_id)
    before = yield from unary("GetTraining", look, timeout, retry)
    yield from unary("ResumeTraining", request, timeout, retry)
    return Cursor(request.training_id, before.training.last_sequence)


def _read(cursor: Cursor, retry: Retry) -> Flow[training_event_pb2.TrainingEvent, errors.UnslothdError | None]:
    """Emits what is new in the open stream; returns why it is to be taken up again, or None when the log ends there."""
    try:
        while (message := (yield Next())) is not None:
            for event in _events(message):
                if event.sequence > cursor.sequence + 1:
                    yield CloseStream()
                    return _gap(cursor, event.sequence)
                if 0 < event.sequence <= cursor.sequence:
                    continue  # seen before the connection was lost
                retry.progress()
                if event.sequence == 0:
                    continue  # a heartbeat
                cursor.take(event)
                yield Emit(event)
    except errors.UnslothdError as error:
        if connection_lost(error):
            return None if cursor.succeeded else error
        if cursor.outcome is None:
            raise
        return None  # Train ends with the training's own error, which its last event has told
    return None if cursor.outcome is not None else ended_early("the event stream")


def _events(
    message: service_pb2.TrainResponse | service_pb2.WatchTrainingResponse,
) -> Iterable[training_event_pb2.TrainingEvent]:
    """The events of a response; an older server sends one at a time."""
    several = message.events if isinstance(message, service_pb2.WatchTrainingResponse) else ()
    return several or (message.event,)


def _wait(cursor: Cursor, retry: Retry, lost: errors.UnslothdError) -> Flow[Any, bool]:
    """Waits for the next attempt; False when there is none left, but how the training ended is known."""
    try:
        delay = retry.next_delay(lost)
    except errors.UnslothdError:
        if cursor.outcome is None:
            raise
        return False
    yield Sleep(delay)
    return True


def _known(cursor: Cursor) -> Outcome:
    assert cursor.outcome is not None
    return cursor.outcome


def _final(cursor: Cursor, retry: Retry, timeout: float | None) -> Flow[Any, Outcome | None]:
    """Looks up how a training ended whose last event was seen before; None while there is more to read."""
    request = service_pb2.GetTrainingRequest(training_id=cursor.training_id)
    response = yield from unary("GetTraining", request, timeout, retry)
    training: training_pb2.Training = response.training
    if training.state not in _FINAL_STATES or training.last_sequence > cursor.sequence:
        return None
    return _outcome(training.state, training.training_id, training.metrics, training.error, training.step)


def outcome_of(event: training_event_pb2.TrainingEvent) -> Outcome | None:
    """Returns how the training ended if this is a terminal event, else None."""
    kind = event.WhichOneof("kind")
    if kind == "succeeded":
        return Outcome(metrics=event.succeeded.metrics)
    if kind == "failed":
        return Outcome(error=errors.training_failed(event.failed.error, event.training_id))
    if kind == "cancelled":
        return Outcome(error=errors.training_cancelled(event.training_id, event.cancelled.step))
    return None


def _outcome(
    state: "training_pb2.Training.State.ValueType",
    training_id: str,
    metrics: training_pb2.TrainingMetrics,
    error: Status,
    step: int,
) -> Outcome:
    if state == training_pb2.Training.STATE_SUCCEEDED:
        return Outcome(metrics=metrics)
    if state == training_pb2.Training.STATE_FAILED:
        return Outcome(error=errors.training_failed(error, training_id))
    return Outcome(error=errors.training_cancelled(training_id, step))


def generate(request: service_pb2.GenerateRequest) -> Flow[str, generation_pb2.GenerateSummary | None]:
    """Emits pieces of text and returns the summary. Not repeated after a loss: sampled text would differ."""
    summary: generation_pb2.GenerateSummary | None = None
    yield OpenStream("Generate", request)
    while (message := (yield Next())) is not None:
        if message.HasField("summary"):
            summary = message.summary
        else:
            yield Emit(message.text)
    return summary


def list_datasets(
    request: service_pb2.ListDatasetsRequest, limit: int | None, timeout: float | None, retry: Retry
) -> Flow[Any, list[dataset_pb2.Dataset]]:
    """Returns the newest `limit` datasets, or all, page by page."""
    found: list[dataset_pb2.Dataset] = []
    while True:
        response = yield from unary("ListDatasets", request, timeout, retry)
        found += response.datasets
        if not response.next_page_token or (limit is not None and len(found) >= limit):
            return found[:limit]
        request.page_token = response.next_page_token


def list_trainings(
    request: service_pb2.ListTrainingsRequest, limit: int | None, timeout: float | None, retry: Retry
) -> Flow[Any, list[training_pb2.Training]]:
    """Returns the first `limit` trainings that match, or all, page by page."""
    found: list[training_pb2.Training] = []
    while True:
        response = yield from unary("ListTrainings", request, timeout, retry)
        found += response.trainings
        if not response.next_page_token or (limit is not None and len(found) >= limit):
            return found[:limit]
        request.page_token = response.next_page_token


def ended_early(what: str) -> errors.UnslothdError:
    """Returns the error of a stream that ended well, but before its last message."""
    return errors.Unavailable(f"{what} ended before its last message", code=grpc.StatusCode.OK)


def _gap(cursor: Cursor, sequence: int) -> errors.UnslothdError:
    return errors.Internal(
        f"the log of training {cursor.training_id} jumped from sequence {cursor.sequence} to {sequence}",
        code=grpc.StatusCode.DATA_LOSS,
    )
