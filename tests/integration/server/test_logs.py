"""The server's own log: what a line says of the call, model and training that it is about."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from doubles.fake_worker import fake_row
from support.calls import CALL_SECONDS, inline, prepared_model, train
from support.running_server import RunningServer, a_model
from support.waiting import wait_until
from unslothd.v1 import service_pb2 as pb
from unslothd.v1.service_pb2_grpc import UnslothServiceStub


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    with RunningServer(tmp_path_factory.mktemp("server"), fake_workers=True, arguments=("--verbose",)) as running:
        a_model(running, "tiny")
        yield running


def log_lines(server: RunningServer) -> list[dict[str, Any]]:
    return [json.loads(line) for line in server.log.read_text().splitlines()]


def told_call_id(call: grpc.Call) -> str:
    return dict(call.trailing_metadata())["unslothd-call-id"]


def lines_of(server: RunningServer, call_id: str) -> list[dict[str, Any]]:
    return [line for line in log_lines(server) if line.get("call_id") == call_id]


def test_every_line_is_json_where_no_terminal_is_and_has_its_time_and_level(server: RunningServer):
    for line in log_lines(server):
        assert {"timestamp", "level", "event"} <= line.keys()


def test_a_call_is_told_the_id_that_its_lines_in_the_log_and_the_audit_log_have(
    server: RunningServer, stub: UnslothServiceStub
):
    _, call = stub.ListModels.with_call(pb.ListModelsRequest(), timeout=CALL_SECONDS)
    (line,) = lines_of(server, told_call_id(call))
    assert (line["event"], line["rpc"], line["code"], line["caller"]) == ("rpc", "ListModels", "OK", "local")
    audit = [json.loads(each) for each in (server.home / "audit.jsonl").read_text().splitlines()]
    assert [each["rpc"] for each in audit if each["call_id"] == told_call_id(call)] == ["ListModels"]


def test_a_refused_call_is_told_its_id_too_and_its_line_names_what_it_asked_for(
    server: RunningServer, stub: UnslothServiceStub
):
    with pytest.raises(grpc.RpcError) as caught:
        stub.GetTraining(pb.GetTrainingRequest(training_id="training-20261124-120000-abcdef"), timeout=CALL_SECONDS)
    (line,) = lines_of(server, told_call_id(caught.value))  # type: ignore[arg-type]
    assert (line["reason"], line["training_id"]) == ("TRAINING_NOT_FOUND", "training-20261124-120000-abcdef")


def test_two_calls_have_two_ids(stub: UnslothServiceStub):
    calls = [stub.ListModels.with_call(pb.ListModelsRequest(), timeout=CALL_SECONDS)[1] for _ in range(2)]
    assert told_call_id(calls[0]) != told_call_id(calls[1])


def test_what_happens_to_a_training_later_names_training_and_model_but_no_call(
    server: RunningServer, stub: UnslothServiceStub, tmp_path: Path
):
    with prepared_model(stub, "tiny") as model:
        row = fake_row(steps=2, die_at_step=2, die_once=str(tmp_path / "died"))
        events = list(train(stub, model.model_id, inline([row])))
    (line,) = [each for each in log_lines(server) if each["event"] == "a training goes on with a new worker"]
    assert (line["training_id"], line["model_id"]) == (events[0].training_id, model.model_id)
    assert "call_id" not in line
    wait_until(lambda: sum(each["event"].startswith("worker ended") for each in log_lines(server)) >= 2)
    ended = [each for each in log_lines(server) if each["event"].startswith("worker ended")]
    assert {each["model_id"] for each in ended} == {model.model_id}


def test_console_lines_are_for_people_wherever_they_go(tmp_path: Path):
    with RunningServer(tmp_path, fake_workers=True, arguments=("--log-format", "console")) as server:
        wait_until(lambda: "ready" in server.log.read_text())
        first = server.log.read_text().splitlines()[0]
    assert not first.startswith("{")
    assert "\x1b" not in first
