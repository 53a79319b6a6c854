"""Who may call what: each refusal, and the record of every call."""

import json
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from doubles.fake_worker import fake_row
from doubles.gates import StepGate
from support.callers import Metadata, bearer, info, then_silence, token_of
from support.calls import CALL_SECONDS, CallError, error_of, inline
from support.running_server import RunningServer, a_model
from support.waiting import wait_until
from unslothd.v1 import service_pb2 as pb
from unslothd.v1.server_info_pb2 import Caller, Scope
from unslothd.v1.service_pb2_grpc import UnslothServiceStub
from unslothd_server.access.scopes import SCOPES
from unslothd_server.access.tokens import TokenFile

SERVICE = pb.DESCRIPTOR.services_by_name["UnslothService"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """Asks who calls."""
    arguments = ("--require-identity", "yes", "--heartbeat-seconds", "0.1")
    with RunningServer(tmp_path_factory.mktemp("server"), fake_workers=True, arguments=arguments) as running:
        a_model(running, "tiny")
        yield running


@pytest.fixture(scope="module")
def channel(server: RunningServer) -> Iterator[grpc.Channel]:
    with server.channel() as channel:
        yield channel


@pytest.fixture(scope="module")
def stub(channel: grpc.Channel) -> UnslothServiceStub:
    return UnslothServiceStub(channel)


@pytest.fixture(scope="module")
def tokens(server: RunningServer) -> dict[str, Metadata]:
    """A token of each scope, by its name."""
    return {scope: token_of(server, f"a-{scope}", scope) for scope in ("read", "train", "admin")}


@pytest.fixture(scope="module")
def model_id(stub: UnslothServiceStub, tokens: dict[str, Metadata]) -> str:
    """A prepared model."""
    *_, last = stub.LoadModel(pb.LoadModelRequest(model_name="tiny"), metadata=tokens["train"], timeout=CALL_SECONDS)
    request = pb.PrepareForTrainingRequest(model_id=last.model.model_id)
    return stub.PrepareForTraining(request, metadata=tokens["train"], timeout=CALL_SECONDS).model.model_id


@contextmanager
def held_training(
    stub: UnslothServiceStub, model_id: str, token: Metadata, gate: StepGate
) -> Iterator[tuple[str, grpc.Call]]:
    """A training that waits at its first step until the block ends, and the stream of its caller."""
    rows = inline([fake_row(steps=1, gate=str(gate))])
    stream = stub.Train(pb.TrainRequest(model_id=model_id, train_dataset=rows), metadata=token, timeout=CALL_SECONDS)
    try:
        yield next(stream).event.training_id, stream
    finally:
        gate.open_all()
        stream.cancel()


def refusal(stub: UnslothServiceStub, metadata: Metadata = ()) -> tuple[str, str]:
    error = error_of(lambda: info(stub, metadata))
    return error.code, error.reason


def raw_error(channel: grpc.Channel, rpc: str, metadata: Metadata = ()) -> CallError | None:
    """Calls any RPC with an empty request; returns its error, if it ends with one."""
    call = channel.stream_stream(f"/{SERVICE.full_name}/{rpc}")
    try:
        return error_of(lambda: call(iter([b""]), metadata=metadata, timeout=CALL_SECONDS))
    except AssertionError:
        return None


def audit_lines(server: RunningServer) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (server.home / "audit.jsonl").read_text().splitlines()]


def tokens_command(server: RunningServer, *arguments: str) -> str:
    command = [sys.executable, "-m", "unslothd.cli", "tokens", *arguments, "--home", str(server.home)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.strip()


# --- tokens ---


def test_without_a_token_nothing_is_served_and_the_answer_says_how_to_get_one(stub: UnslothServiceStub):
    error = error_of(lambda: info(stub))
    assert (error.code, error.reason) == ("UNAUTHENTICATED", "TOKEN_MISSING")
    assert "unslothd tokens create" in error.message


@pytest.mark.parametrize(
    "authorization", ["", "Bearer", "Bearer usd_", f"Bearer usd_{'0' * 64}", "Basic YTpi", "usd_0"]
)
def test_what_is_no_token_of_the_server_is_refused(stub: UnslothServiceStub, authorization: str):
    assert refusal(stub, (("authorization", authorization),)) == ("UNAUTHENTICATED", "TOKEN_UNKNOWN")


def test_two_tokens_are_none(stub: UnslothServiceStub, tokens: dict[str, Metadata]):
    assert refusal(stub, tokens["read"] + tokens["admin"]) == ("UNAUTHENTICATED", "TOKEN_UNKNOWN")


def test_a_token_made_by_the_command_works_at_once_until_it_is_revoked(server: RunningServer, stub: UnslothServiceStub):
    secret = tokens_command(server, "create", "alice", "--scope", "read", "--expires-in", "1h")
    assert info(stub, bearer(secret)).caller == Caller(name="alice", kind=Caller.KIND_TOKEN, scope=Scope.SCOPE_READ)
    (listed,) = [line for line in tokens_command(server, "list").splitlines() if "alice" in line]
    assert "read" in listed
    assert secret not in listed
    tokens_command(server, "revoke", "alice")
    assert refusal(stub, bearer(secret)) == ("UNAUTHENTICATED", "TOKEN_UNKNOWN")


def test_a_token_whose_time_is_over_says_so(server: RunningServer, stub: UnslothServiceStub):
    token = token_of(server, "brief", expire_time=datetime.now(UTC) - timedelta(minutes=1))
    error = error_of(lambda: info(stub, token))
    assert (error.code, error.reason) == ("UNAUTHENTICATED", "TOKEN_EXPIRED")
    assert datetime.fromisoformat(error.metadata["expire_time"]) < datetime.now(UTC)


@pytest.mark.parametrize("scope", ["read", "train", "admin"])
def test_a_token_reaches_the_rpcs_of_its_scope_and_no_other(
    channel: grpc.Channel, tokens: dict[str, Metadata], scope: str
):
    given = Scope.Value(f"SCOPE_{scope.upper()}")
    reasons = {rpc: error.reason if (error := raw_error(channel, rpc, tokens[scope])) else "" for rpc in SCOPES}
    assert {rpc for rpc, reason in reasons.items() if reason == "INSUFFICIENT_SCOPE"} == {
        rpc for rpc, needed in SCOPES.items() if needed > given
    }


def test_too_small_a_scope_is_told_with_the_one_that_is_needed(channel: grpc.Channel, tokens: dict[str, Metadata]):
    error = raw_error(channel, "DeleteDataset", tokens["train"])
    assert error is not None
    assert error.code == "PERMISSION_DENIED"
    assert error.metadata == {"needed_scope": "admin", "scope": "train"}
    assert '"a-train"' in error.message


def test_every_rpc_of_the_contract_asks_for_a_token(channel: grpc.Channel):
    errors = {rpc: raw_error(channel, rpc) for rpc in SERVICE.methods_by_name}
    assert {error.reason if error else "" for error in errors.values()} == {"TOKEN_MISSING"}


@pytest.mark.parametrize("rpc", ["ListModels", "Train", "UploadDataset"])
def test_a_call_is_refused_before_anything_of_its_request_is_there(channel: grpc.Channel, rpc: str):
    with then_silence() as requests:
        call = channel.stream_stream(f"/{SERVICE.full_name}/{rpc}")(requests, timeout=CALL_SECONDS)
        assert error_of(lambda: call).reason == "TOKEN_MISSING"


def test_revoking_a_token_ends_its_open_streams_and_no_other(
    server: RunningServer, stub: UnslothServiceStub, tokens: dict[str, Metadata], model_id: str, tmp_path: Path
):
    watcher = token_of(server, "watcher", "read")
    gate = StepGate(tmp_path / "gate")
    with held_training(stub, model_id, tokens["train"], gate) as (training_id, goes_on):
        request = pb.WatchTrainingRequest(training_id=training_id)
        ended = stub.WatchTraining(request, metadata=watcher, timeout=CALL_SECONDS)
        next(ended)
        TokenFile(server.home).revoke("watcher")
        error = error_of(lambda: ended)
        assert (error.code, error.reason) == ("UNAUTHENTICATED", "TOKEN_UNKNOWN")
        gate.open_all()
        assert [*goes_on][-1].event.HasField("succeeded")


def test_health_is_open_and_reflection_needs_a_token(channel: grpc.Channel, tokens: dict[str, Metadata]):
    health = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=CALL_SECONDS)
    assert health.status == health_pb2.HealthCheckResponse.SERVING
    reflect = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    assert error_of(lambda: reflect(iter([request]), timeout=CALL_SECONDS)).reason == "TOKEN_MISSING"
    (answer,) = reflect(iter([request]), metadata=tokens["read"], timeout=CALL_SECONDS)
    assert SERVICE.full_name in [each.name for each in answer.list_services_response.service]


def test_a_server_on_the_loopback_asks_nobody_and_takes_no_wrong_token(tmp_path: Path):
    with RunningServer(tmp_path, fake_workers=True) as server, server.channel() as channel:
        stub = UnslothServiceStub(channel)
        assert info(stub).caller == Caller(name="local", kind=Caller.KIND_ANONYMOUS, scope=Scope.SCOPE_ADMIN)
        assert refusal(stub, bearer(f"usd_{'0' * 64}")) == ("UNAUTHENTICATED", "TOKEN_UNKNOWN")
        assert info(stub, token_of(server, "alice", "read")).caller.scope == Scope.SCOPE_READ


# --- the audit log ---


def test_every_call_is_in_the_audit_log_with_who_what_and_how_it_ended(
    server: RunningServer, stub: UnslothServiceStub, tokens: dict[str, Metadata], model_id: str, tmp_path: Path
):
    before = len(audit_lines(server))
    gate = StepGate(tmp_path / "gate")
    with held_training(stub, model_id, tokens["train"], gate) as (training_id, stream):
        gate.open_all()
        list(stream)
    stub.GetTraining(pb.GetTrainingRequest(training_id=training_id), metadata=tokens["read"], timeout=CALL_SECONDS)
    error_of(lambda: stub.GetModel(pb.GetModelRequest(model_id="none"), metadata=tokens["read"], timeout=CALL_SECONDS))
    error_of(lambda: info(stub, bearer("usd_wrong")))
    lines = audit_lines(server)[before:]
    for line in lines:
        assert line.pop("time").endswith("+00:00")
        assert line.pop("address").startswith(("ipv4:127.0.0.1:", "ipv6:"))
        assert len(line.pop("call_id")) == 12
        if line["event"] == "ended":
            assert line.pop("ms") >= 0
    trains = {"caller": "a-train", "kind": "token", "rpc": "Train", "model_id": model_id}
    reads = {"event": "ended", "caller": "a-read", "kind": "token"}
    assert lines == [
        {"event": "begun", **trains},
        {"event": "ended", **trains, "training_id": training_id, "code": "OK"},
        {**reads, "rpc": "GetTraining", "training_id": training_id, "model_id": model_id, "code": "OK"},
        {**reads, "rpc": "GetModel", "model_id": "none", "code": "NOT_FOUND", "reason": "MODEL_NOT_FOUND"},
        {
            "event": "ended",
            "caller": "local",
            "kind": "anonymous",
            "rpc": "GetServerInfo",
            "code": "UNAUTHENTICATED",
            "reason": "TOKEN_UNKNOWN",
        },
    ]


def test_a_caller_that_goes_away_is_in_the_audit_log(
    server: RunningServer, stub: UnslothServiceStub, tokens: dict[str, Metadata], model_id: str, tmp_path: Path
):
    with held_training(stub, model_id, tokens["train"], StepGate(tmp_path / "gate")) as (training_id, stream):
        stream.cancel()
        wait_until(lambda: audit_lines(server)[-1]["event"] == "ended")
        last = audit_lines(server)[-1]
        assert (last["rpc"], last["training_id"], last["code"]) == ("Train", training_id, "CANCELLED")


def test_no_token_is_in_any_file_of_the_home_or_in_the_log(
    server: RunningServer, stub: UnslothServiceStub, tokens: dict[str, Metadata]
):
    refusal(stub, bearer("usd_not-a-token"))
    for metadata in tokens.values():
        info(stub, metadata)
    secrets = [metadata[0][1].removeprefix("Bearer usd_") for metadata in (*tokens.values(), bearer("usd_not-a-token"))]
    files = [path for path in server.home.rglob("*") if path.is_file()] + [server.log]
    assert [path for path in files if any(secret in path.read_text(errors="replace") for secret in secrets)] == []
    for name in ("audit.jsonl", "tokens.json"):
        assert stat.S_IMODE((server.home / name).stat().st_mode) == 0o600
