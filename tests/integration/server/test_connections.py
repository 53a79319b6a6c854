"""Bad connections: whoever comes through them sees every event once, and nobody else notices."""

import json
import os
import signal
import time
from typing import Any

import psutil
import pytest

import unslothd
from doubles.fake_worker import fake_row
from doubles.gates import StepGate
from support.calls import CALL_SECONDS, inline, watch
from support.flaky_proxy import FlakyProxy
from support.running_server import RunningServer
from support.stopped_watchers import stopped_watchers
from support.waiting import wait_until
from unslothd.v1 import service_pb2 as pb
from unslothd.v1.model_pb2 import Model
from unslothd.v1.service_pb2_grpc import UnslothServiceStub
from unslothd.v1.training_event_pb2 import TrainingEvent

STOPPED = 500
NOTICED_SECONDS = 40.0  # what the client promises; gRPC's own answer to a ping may take 60 s
# The flood has 3 MB for each watcher, so 500 that queued it would hold 1.5 GB.
FLOOD, FLOOD_BYTES = 1500, 2000
MOST_BYTES_A_WATCHER = 150_000  # with its connection: what gRPC itself buffers, and Python's objects


def begin(stub: UnslothServiceStub, model: Model, **knobs: Any) -> str:
    """Starts a training that its caller leaves."""
    call = stub.Train(pb.TrainRequest(model_id=model.model_id, train_dataset=inline([fake_row(**knobs)])))
    training_id = next(call).event.training_id
    call.cancel()
    return training_id


def sequences(events: list[TrainingEvent]) -> list[int]:
    return [event.sequence for event in events]


@pytest.mark.parametrize("bad", [{"cut_after_s": 0.15}, {"delay_s": 0.02}, {"cut_after_s": 0.3, "delay_s": 0.01}])
def test_a_client_behind_a_bad_connection_sees_every_event_once(
    bad: dict[str, float], server: RunningServer, stub: UnslothServiceStub, model: Model
):
    training_id = begin(stub, model, steps=300, step_seconds=0.005, flood=500)
    with FlakyProxy(server.target, **bad) as proxy, unslothd.Client(proxy.target) as client:
        seen = list(client.watch(training_id))
    assert seen == list(watch(stub, training_id))
    assert sequences(seen) == list(range(1, len(seen) + 1))
    assert seen[-1].HasField("succeeded")
    if "cut_after_s" in bad:
        assert proxy.connections > 1


def test_a_training_that_is_begun_behind_a_connection_that_is_cut_again_and_again_runs_once(
    server: RunningServer, stub: UnslothServiceStub, model: Model
):
    rows = [json.loads(fake_row(steps=200, step_seconds=0.005))]
    with FlakyProxy(server.target, cut_after_s=0.15) as proxy, unslothd.Client(proxy.target) as client:
        seen = list(client.train(model, rows, labels={"behind": "a flaky proxy"}))
    assert sequences(seen) == list(range(1, len(seen) + 1))
    assert seen[-1].HasField("succeeded")
    request = pb.ListTrainingsRequest(labels={"behind": "a flaky proxy"})
    assert len(stub.ListTrainings(request, timeout=CALL_SECONDS).trainings) == 1


def test_a_client_whose_connection_falls_silent_notices_and_goes_on_over_another_one(
    server: RunningServer, stub: UnslothServiceStub, model: Model, gate: StepGate
):
    training_id = begin(stub, model, steps=3, gate=str(gate))
    options = {"grpc.keepalive_time_ms": 1000}  # asks after 1 s of silence in place of 30; waits for 10 s as always
    with FlakyProxy(server.target) as proxy, unslothd.Client(proxy.target, options=options) as client:
        run = client.watch(training_id)
        seen = [next(run)]
        proxy.fall_silent()
        gate.open_all()
        began = time.monotonic()
        seen += list(run)
        assert time.monotonic() - began < NOTICED_SECONDS
        assert proxy.connections > 1
    assert sequences(seen) == list(range(1, len(seen) + 1))
    assert seen[-1].HasField("succeeded")


def test_watchers_that_vanish_without_a_word_leave_nothing_behind(
    server: RunningServer, stub: UnslothServiceStub, model: Model, gate: StepGate
):
    training_id = begin(stub, model, steps=1, gate=str(gate))
    service = psutil.Process(server.process.pid)
    before = service.num_fds()
    with FlakyProxy(server.target) as proxy:
        with stopped_watchers(proxy.target, training_id, 50):
            assert service.num_fds() > before + 40
        wait_until(lambda: service.num_fds() <= before)
    gate.open_all()
    assert list(watch(stub, training_id))[-1].HasField("succeeded")


def test_stopped_watchers_cost_bounded_memory_and_hold_nobody_up(
    server: RunningServer, stub: UnslothServiceStub, model: Model, gate: StepGate
):
    first = begin(stub, model, steps=1, gate=str(gate))
    flooded = begin(
        stub, model, steps=2, flood=FLOOD, flood_bytes=FLOOD_BYTES
    )  # waits, so that the watchers are there before the flood
    service = psutil.Process(server.process.pid)
    before = service.memory_info().rss
    with stopped_watchers(server.target, flooded, STOPPED) as watchers:
        os.kill(watchers.pid, signal.SIGSTOP)
        gate.open_all()
        events = list(watch(stub, flooded))
        after = service.memory_info().rss
    assert list(watch(stub, first))[-1].HasField("succeeded")
    assert sequences(events) == list(range(1, len(events) + 1))
    assert len(events) > FLOOD
    assert events[-1].HasField("succeeded")
    assert after - before < STOPPED * MOST_BYTES_A_WATCHER, f"{(after - before) / STOPPED:.0f} bytes a watcher"
