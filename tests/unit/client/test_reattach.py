"""Every event reaches the user once, however often the connection breaks: both clients, over real sockets."""

import asyncio
import contextlib
import math
import random
import socket
import struct
import threading
from collections.abc import Callable, Iterator

import grpc
import pytest
from google.protobuf.message import Message

import unslothd
from support.scripted_server import Say
from unslothd import errors
from unslothd.v1 import model_pb2, service_pb2, training_event_pb2, training_pb2

ROWS = [{"text": "hello"}]


def train_sync(target: str, **arguments: object) -> tuple[list[int], unslothd.TrainingMetrics]:
    with unslothd.Client(target) as client:
        run = client.train("m", ROWS, **arguments)
        sequences = [event.sequence for event in run]
        assert run.last_sequence == sequences[-1]
        return sequences, run.result()


def train_async(target: str, **arguments: object) -> tuple[list[int], unslothd.TrainingMetrics]:
    async def main() -> tuple[list[int], unslothd.TrainingMetrics]:
        async with asyncio.timeout(30), unslothd.AsyncClient(target) as client:
            run = await client.train("m", ROWS, **arguments)
            sequences = [event.sequence async for event in run]
            assert run.last_sequence == sequences[-1]
            return sequences, await run.result()

    return asyncio.run(main())


@pytest.fixture(params=[train_sync, train_async], ids=["sync", "async"])
def train(request: pytest.FixtureRequest) -> Callable[..., tuple[list[int], unslothd.TrainingMetrics]]:
    return request.param


def test_a_training_without_trouble_yields_every_event_and_its_metrics(server, say, train):
    server.script.on("Train", say.events(1, 2, say.heartbeat(), say.succeeded(3)))
    sequences, metrics = train(server.target)
    assert sequences == [1, 2, 3]
    assert metrics.train_loss == 0.5


@pytest.mark.parametrize(
    "code",
    [
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.CANCELLED,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.UNKNOWN,
    ],
)
def test_a_broken_stream_is_read_on_after_the_last_sequence(server, say, train, code):
    server.script.on("Train", say.events(1, 2, then=say.lose(code)))
    server.script.on("WatchTraining", say.events(3, then=say.lose(code)), say.events(4, say.succeeded(5)))
    assert train(server.target)[0] == [1, 2, 3, 4, 5]
    after = [request.after_sequence for request in server.script.calls("WatchTraining")]
    assert after == [2, 3]


def test_a_stream_that_is_lost_before_the_first_event_is_started_again_with_the_same_request_id(server, say, train):
    server.script.on("Train", say.lose(), say.lose(), say.events(1, say.succeeded(2)))
    assert train(server.target)[0] == [1, 2]
    ids = {request.request_id for request in server.script.calls("Train")}
    assert len(server.script.calls("Train")) == 3
    assert len(ids) == 1
    assert len(ids.pop()) == 36


def test_a_request_id_of_the_users_own_is_sent(server, say, train):
    server.script.on("Train", say.events(say.succeeded(1)))
    train(server.target, request_id="mine")
    assert server.script.calls("Train")[0].request_id == "mine"


def test_a_server_that_is_stopping_is_waited_for(server, say, train):
    stopping = say.refuse(grpc.StatusCode.UNAVAILABLE, "SERVER_STOPPING")
    server.script.on("Train", say.events(1, then=stopping))
    server.script.on("WatchTraining", stopping, say.events(say.succeeded(2)))
    assert train(server.target)[0] == [1, 2]


def test_events_that_are_sent_twice_are_seen_once(server, say, train):
    server.script.on("Train", say.events(1, 2, then=say.lose()))
    server.script.on("WatchTraining", say.events(1, 2, 2, 3, say.succeeded(4)))
    assert train(server.target)[0] == [1, 2, 3, 4]


def test_a_gap_in_the_sequences_is_read_again(server, say, train):
    server.script.on("Train", say.events(1, 3))
    server.script.on("WatchTraining", say.events(2, 3, say.succeeded(4)))
    assert train(server.target)[0] == [1, 2, 3, 4]


def test_a_stream_that_ends_well_but_too_early_is_read_on(server, say, train):
    running = training_pb2.Training(
        training_id=say.TRAINING, state=training_pb2.Training.STATE_RUNNING, last_sequence=2
    )
    server.script.on("Train", say.events(1))
    server.script.on("WatchTraining", say.events(2), say.events(say.succeeded(3)))
    server.script.on("GetTraining", say.answer(service_pb2.GetTrainingResponse(training=running)))
    assert train(server.target)[0] == [1, 2, 3]


def test_a_server_that_dies_and_comes_back_on_its_port_is_found_again(server, say, train):
    two_sent, died = threading.Event(), threading.Event()

    def wait(_request: object, _context: object) -> None:
        two_sent.set()
        died.wait(20)

    server.script.on("Train", say.events(1, 2, then=wait))
    server.script.on("WatchTraining", say.events(3, say.succeeded(4)))
    result: list[list[int]] = []
    reader = threading.Thread(target=lambda: result.append(train(server.target)[0]))
    reader.start()
    assert two_sent.wait(20)
    server.stop()
    died.set()
    server.start()
    reader.join(30)
    assert result == [[1, 2, 3, 4]]


def test_a_failed_training_raises_after_its_failed_event(server, say, train):
    status = say.status(grpc.StatusCode.RESOURCE_EXHAUSTED, "OUT_OF_MEMORY", "the device ran out of memory")
    failed = say.event(2, failed=training_event_pb2.TrainingFailed(error=status))
    server.script.on(
        "Train", say.events(1, failed, then=say.refuse(grpc.StatusCode.RESOURCE_EXHAUSTED, "OUT_OF_MEMORY"))
    )
    with pytest.raises(errors.TrainingFailed, match="the device ran out of memory") as caught:
        train(server.target)
    assert caught.value.reason == "OUT_OF_MEMORY"
    assert caught.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert caught.value.metadata == {"hint": "7"}
    assert caught.value.training_id == say.TRAINING


def test_a_cancelled_training_raises_after_its_cancelled_event(server, say, train):
    cancelled = say.event(2, cancelled=training_event_pb2.TrainingCancelled(step=1))
    server.script.on("Train", say.events(1, cancelled))
    with pytest.raises(errors.TrainingCancelled, match="after step 1") as caught:
        train(server.target)
    assert caught.value.reason == "TRAINING_CANCELLED"


def failed_at(say: type[Say], sequence: int) -> training_event_pb2.TrainingEvent:
    status = say.status(grpc.StatusCode.ABORTED, "WORKER_DIED", "the worker died")
    return say.event(sequence, failed=training_event_pb2.TrainingFailed(error=status))


def queued_at(say: type[Say], sequence: int) -> training_event_pb2.TrainingEvent:
    changed = training_event_pb2.TrainingStateChanged(state=training_pb2.Training.STATE_QUEUED)
    return say.event(sequence, state_changed=changed)


def test_a_log_that_goes_on_after_a_failed_event_is_read_to_its_end(server, say):
    server.script.on("WatchTraining", say.events(1, failed_at(say, 2), queued_at(say, 3), 4, say.succeeded(5)))
    with unslothd.Client(server.target) as client:
        run = client.watch(say.TRAINING)
        assert [event.sequence for event in run] == [1, 2, 3, 4, 5]
        assert run.result().train_loss == 0.5


def test_a_training_that_is_brought_back_while_the_connection_is_lost_is_followed_on(server, say, train):
    server.script.on("Train", say.events(1, failed_at(say, 2), then=say.lose()))
    server.script.on("WatchTraining", say.events(queued_at(say, 3), 4, say.succeeded(5)))
    assert train(server.target)[0] == [1, 2, 3, 4, 5]
    assert [request.after_sequence for request in server.script.calls("WatchTraining")] == [2]


def test_a_resumed_training_whose_connection_is_lost_is_not_taken_for_over(server, say):
    server.script.on(
        "WatchTraining",
        say.events(1, failed_at(say, 2), queued_at(say, 3), then=say.lose()),
        say.events(4, say.succeeded(5)),
    )
    with unslothd.Client(server.target) as client:
        assert [event.sequence for event in client.watch(say.TRAINING)] == [1, 2, 3, 4, 5]


def test_a_connection_that_is_lost_after_the_last_event_of_a_failed_training_changes_nothing(server, say, train):
    server.script.on("Train", say.events(1, failed_at(say, 2), then=say.lose()))
    server.script.on("WatchTraining", say.events())
    with pytest.raises(errors.TrainingFailed, match="the worker died"):
        train(server.target)


def test_a_server_that_stays_away_after_the_last_event_leaves_the_known_end(server, say):
    server.script.on("Train", say.events(1, failed_at(say, 2), then=say.lose()))
    server.script.on("WatchTraining", *[say.lose()] * 50)
    with unslothd.Client(server.target, reconnect_timeout=0.3) as client:
        run = client.train("m", ROWS)
        with pytest.raises(errors.TrainingFailed, match="the worker died"):
            run.result()


def test_nothing_is_waited_for_after_a_training_that_succeeded(server, say, train):
    server.script.on("Train", say.events(1, say.succeeded(2), then=say.lose()))
    assert train(server.target)[0] == [1, 2]
    assert server.script.calls("WatchTraining") == []


def test_the_error_that_ends_a_train_stream_is_the_trainings_outcome(server, say):
    refusal = say.refuse(grpc.StatusCode.ABORTED, "WORKER_DIED", "the worker died")
    server.script.on("Train", say.events(1, failed_at(say, 2), then=refusal))
    with unslothd.Client(server.target) as client:
        run = client.train("m", ROWS)
        with pytest.raises(errors.TrainingFailed, match="the worker died"):
            run.result()
        assert run.last_sequence == 2


def test_an_unreachable_hub_is_the_trainings_own_error_and_not_tried_again(server, say, train):
    server.script.on("Train", say.refuse(grpc.StatusCode.UNAVAILABLE, "HUB_UNREACHABLE", "the Hub cannot be reached"))
    with pytest.raises(errors.Unavailable, match="the Hub cannot be reached"):
        train(server.target)
    assert len(server.script.calls("Train")) == 1


def test_the_failed_event_is_seen_before_the_error_and_result_raises_it_again(server, say):
    failed = say.event(2, failed=training_event_pb2.TrainingFailed(error=say.status(grpc.StatusCode.ABORTED, "X", "x")))
    server.script.on("Train", say.events(1, failed))
    with unslothd.Client(server.target) as client:
        run = client.train("m", ROWS)
        seen = []
        with pytest.raises(errors.TrainingFailed):  # noqa: PT012 - the loop itself is under test
            for event in run:
                seen.append(event.WhichOneof("kind"))
        assert seen == ["step", "failed"]
        assert list(run) == []
        with pytest.raises(errors.TrainingFailed):
            run.result()


def test_a_refusal_is_raised_by_train_itself(server, say):
    server.script.on("Train", say.refuse(grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND", "no model m"))
    with unslothd.Client(server.target) as client, pytest.raises(errors.NotFound, match="no model m"):
        client.train("m", ROWS)


def test_the_id_of_a_training_is_known_before_it_is_read(server, say):
    server.script.on("Train", say.events(1, say.succeeded(2)))
    with unslothd.Client(server.target) as client:
        run = client.train("m", ROWS)
        assert run.training_id == say.TRAINING
        assert run.last_sequence == 0
        assert [event.sequence for event in run] == [1, 2]


def test_a_lost_connection_is_given_up_after_reconnect_timeout(server, say):
    server.script.on("Train", say.events(1, then=say.lose()))
    server.script.on("WatchTraining", *[say.lose()] * 50)
    with unslothd.Client(server.target, reconnect_timeout=0.3) as client:
        run = client.train("m", ROWS)
        with pytest.raises(errors.Unavailable, match="Socket closed"):
            list(run)
        with pytest.raises(errors.Unavailable):
            run.result()
        assert 2 <= len(server.script.calls("WatchTraining")) < 50


def test_a_log_whose_gap_stays_is_given_up(server, say):
    server.script.on("Train", say.events(1, 3))
    server.script.on("WatchTraining", *[say.events(3)] * 50)
    with unslothd.Client(server.target, reconnect_timeout=0.3) as client:
        run = client.train("m", ROWS)
        with pytest.raises(errors.Internal, match="from sequence 1 to 3"):
            list(run)


def test_a_watch_ends_without_an_error_and_its_result_has_it(server, say):
    failed = say.event(2, failed=training_event_pb2.TrainingFailed(error=say.status(grpc.StatusCode.ABORTED, "X", "x")))
    server.script.on("WatchTraining", say.events(1, then=say.lose()), say.events(failed))
    with unslothd.Client(server.target) as client:
        run = client.watch(say.TRAINING)
        assert [event.sequence for event in run] == [1, 2]
        with pytest.raises(errors.TrainingFailed):
            run.result()


def test_a_watch_of_a_finished_training_after_its_last_event_knows_the_outcome(server, say):
    training = training_pb2.Training(
        training_id=say.TRAINING,
        state=training_pb2.Training.STATE_SUCCEEDED,
        last_sequence=4,
        metrics=training_pb2.TrainingMetrics(train_loss=0.25),
    )
    server.script.on("WatchTraining", say.events())
    server.script.on("GetTraining", say.answer(service_pb2.GetTrainingResponse(training=training)))
    with unslothd.Client(server.target) as client:
        run = client.watch(training, after_sequence=4)
        assert list(run) == []
        assert run.result().train_loss == 0.25


def test_an_async_watch_reads_on_too(server, say):
    server.script.on("WatchTraining", say.events(3, then=say.lose()), say.events(say.succeeded(4)))

    async def main() -> list[int]:
        async with asyncio.timeout(20), unslothd.AsyncClient(server.target) as client:
            return [event.sequence async for event in client.watch(say.TRAINING, after_sequence=2)]

    assert asyncio.run(main()) == [3, 4]
    assert [request.after_sequence for request in server.script.calls("WatchTraining")] == [2, 3]


def load_messages() -> list[service_pb2.LoadModelResponse]:
    phase = model_pb2.LoadProgress.PHASE_STARTING_WORKER
    return [
        service_pb2.LoadModelResponse(progress=model_pb2.LoadProgress(phase=phase, model_id="m")),
        service_pb2.LoadModelResponse(model=model_pb2.Model(model_id="m", max_seq_length=64)),
    ]


def test_a_load_that_is_cut_off_attaches_again_and_returns_the_model(server, say):
    progress, done = load_messages()
    server.script.on("LoadModel", say.messages(progress, then=say.lose()), say.messages(progress, done))
    seen: list[str] = []
    with unslothd.Client(server.target) as client:
        model = client.load_model("org/name", max_seq_length=64, on_progress=lambda each: seen.append(each.model_id))
    assert model.model_id == "m"
    assert seen == ["m", "m"]
    first, second = server.script.calls("LoadModel")
    assert first == second
    assert first.max_seq_length == 64
    assert not first.HasField("load_in_4bit")


def test_an_async_load_returns_the_model(server, say):
    progress, done = load_messages()
    server.script.on("LoadModel", say.messages(progress, then=say.lose()), say.messages(progress, done))

    async def main() -> str:
        async with asyncio.timeout(20), unslothd.AsyncClient(server.target) as client:
            return (await client.load_model("org/name")).model_id

    assert asyncio.run(main()) == "m"


def test_a_run_that_is_left_says_so_when_its_result_is_asked_for(server, say):
    server.script.on("Train", say.events(1, 2, 3, say.succeeded(4)))
    with unslothd.Client(server.target) as client:
        with client.train("m", ROWS) as run:
            next(run)
        with pytest.raises(RuntimeError, match="closed"):
            run.result()


def test_a_run_that_is_closed_from_another_thread_ends(server, say):
    two_read, left = threading.Event(), threading.Event()

    def hold(request: Message, context: grpc.ServicerContext) -> Iterator[Message]:
        context.add_callback(left.set)  # first of all: nobody goes on with events for a client that left
        yield from say.events(1, 2)(request, context)
        left.wait(20)

    server.script.on("Train", hold)
    seen: list[int] = []

    def read(run: unslothd.TrainingRun) -> None:
        for event in run:
            seen.append(event.sequence)
            if event.sequence == 2:
                two_read.set()

    with unslothd.Client(server.target) as client:
        run = client.train("m", ROWS)
        reader = threading.Thread(target=read, args=[run])
        reader.start()
        assert two_read.wait(20)
        run.close()
        reader.join(20)
    assert not reader.is_alive()
    assert seen == [1, 2]
    assert left.wait(20)
    assert server.script.calls("WatchTraining") == []


def test_a_lost_connection_is_logged_once(server, say, caplog):
    server.script.on("Train", say.events(1, then=say.lose()))
    server.script.on("WatchTraining", say.lose(), say.lose(), say.events(say.succeeded(2)))
    train_sync(server.target)
    assert [record.getMessage() for record in caplog.records if record.name == "unslothd"] == [
        f"connection lost, trying again for up to 120 s: Socket closed (server {server.target}). "
        "Check that `unslothd serve` runs there and that the target is right."
    ]


BREAKS = 5


class Breaker:
    """A TCP proxy that resets its first five connections after a few hundred bytes of answers, another number each."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._random = random.Random(7)
        self.resets = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.target = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.create_connection(("127.0.0.1", self._port))
            forward = threading.Thread(target=self._forward, args=[client, server], daemon=True)
            forward.start()
            threading.Thread(target=self._backward, args=[server, client, forward], daemon=True).start()

    def _forward(self, client: socket.socket, server: socket.socket) -> None:
        try:
            while data := client.recv(4096):
                server.sendall(data)
        except OSError:
            pass
        server.close()

    def _backward(self, server: socket.socket, client: socket.socket, forward: threading.Thread) -> None:
        # Five times at most 800 bytes are less than 150 events have: each of the five is cut in the middle.
        left = self._random.randint(400, 800) if self.resets < BREAKS else math.inf
        try:
            while left > 0 and (data := server.recv(int(min(left, 512)))):
                client.sendall(data)
                left -= len(data)
        except OSError:
            pass
        self.resets += 1
        # A socket on which another thread waits is not closed: wake it first.
        with contextlib.suppress(OSError):
            client.shutdown(socket.SHUT_RD)
        forward.join(10)
        # With a linger time of 0 closing sends RST instead of FIN.
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.close()


def test_every_event_comes_once_over_a_line_that_breaks_again_and_again(server, say, train):
    def log(request: service_pb2.TrainRequest | service_pb2.WatchTrainingRequest, context: object) -> object:
        first = request.after_sequence + 1 if isinstance(request, service_pb2.WatchTrainingRequest) else 1
        return say.events(*range(first, 150), say.succeeded(150))(request, context)

    server.script.on("Train", *[log] * 1000)
    server.script.on("WatchTraining", *[log] * 1000)
    breaker = Breaker(server.port)
    try:
        assert train(breaker.target)[0] == list(range(1, 151))
    finally:
        breaker.close()
    assert breaker.resets >= BREAKS
    assert len({request.request_id for request in server.script.calls("Train")}) == 1
