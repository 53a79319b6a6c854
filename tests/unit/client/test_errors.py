"""Errors of calls reach the user typed, with the server's code, reason, text and every wrong field."""

import asyncio
import socket
import time

import grpc
import pytest

import unslothd
from unslothd import errors
from unslothd.v1 import model_pb2, service_pb2, training_pb2

KINDS = {
    grpc.StatusCode.INVALID_ARGUMENT: errors.InvalidRequest,
    grpc.StatusCode.UNAUTHENTICATED: errors.Unauthenticated,
    grpc.StatusCode.PERMISSION_DENIED: errors.PermissionDenied,
    grpc.StatusCode.NOT_FOUND: errors.NotFound,
    grpc.StatusCode.ALREADY_EXISTS: errors.AlreadyExists,
    grpc.StatusCode.FAILED_PRECONDITION: errors.FailedPrecondition,
    grpc.StatusCode.RESOURCE_EXHAUSTED: errors.ResourceExhausted,
    grpc.StatusCode.OUT_OF_RANGE: errors.OutOfRange,
    grpc.StatusCode.ABORTED: errors.Aborted,
    grpc.StatusCode.UNAVAILABLE: errors.Unavailable,
    grpc.StatusCode.DEADLINE_EXCEEDED: errors.DeadlineExceeded,
    grpc.StatusCode.UNIMPLEMENTED: errors.Unimplemented,
    grpc.StatusCode.INTERNAL: errors.Internal,
    grpc.StatusCode.DATA_LOSS: errors.UnslothdError,
}


@pytest.mark.parametrize("code", KINDS)
def test_each_code_has_its_exception(server, say, code):
    server.script.on("GetModel", say.refuse(code, "SOME_REASON", "what to do next"))
    with unslothd.Client(server.target) as client, pytest.raises(errors.UnslothdError) as caught:
        client.get_model("m")
    assert type(caught.value) is KINDS[code]
    assert caught.value.code is code
    assert caught.value.reason == "SOME_REASON"
    assert str(caught.value) == caught.value.message == "what to do next"
    assert caught.value.metadata == {"hint": "7"}
    assert isinstance(caught.value.__cause__, grpc.RpcError)


def test_every_wrong_field_is_named(server, say):
    refusal = say.refuse(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD", "two", seed="too large", optim="unknown")
    server.script.on("PrepareForTraining", refusal)
    with unslothd.Client(server.target) as client, pytest.raises(errors.InvalidRequest) as caught:
        client.prepare("m", seed=2**33)
    assert caught.value.field_violations == (
        errors.FieldViolation("seed", "too large"),
        errors.FieldViolation("optim", "unknown"),
    )


def test_the_async_client_maps_errors_alike(server, say):
    server.script.on("GetTraining", say.refuse(grpc.StatusCode.NOT_FOUND, "TRAINING_NOT_FOUND", "no such training"))

    async def main() -> None:
        async with asyncio.timeout(20), unslothd.AsyncClient(server.target) as client:
            await client.get_training("t")

    with pytest.raises(errors.NotFound, match="no such training") as caught:
        asyncio.run(main())
    assert caught.value.reason == "TRAINING_NOT_FOUND"


def test_a_server_that_is_not_there_is_said_at_once_with_its_address():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        target = f"127.0.0.1:{taken.getsockname()[1]}"
    begin = time.monotonic()
    with unslothd.Client(target) as client, pytest.raises(errors.Unavailable) as caught:
        client.server_info()
    assert target in str(caught.value)
    assert "unslothd serve" in str(caught.value)
    assert time.monotonic() - begin < 5


def test_a_look_up_is_repeated_while_a_known_server_is_away(server, say):
    server.script.on("GetServerInfo", say.answer(service_pb2.GetServerInfoResponse()))
    answer = service_pb2.ListModelsResponse(models=[model_pb2.Model(model_id="m")])
    server.script.on("ListModels", say.lose(), say.lose(), say.answer(answer))
    with unslothd.Client(server.target) as client:
        client.server_info()
        assert [model.model_id for model in client.list_models()] == ["m"]


def test_an_unload_is_not_repeated(server, say):
    server.script.on("GetServerInfo", say.answer(service_pb2.GetServerInfoResponse()))
    server.script.on("UnloadModel", say.lose(), say.answer(service_pb2.UnloadModelResponse()))
    with unslothd.Client(server.target) as client:
        client.server_info()
        with pytest.raises(errors.Unavailable):
            client.unload_model("m")
    assert len(server.script.calls("UnloadModel")) == 1


def test_a_call_without_an_answer_ends_at_its_timeout(server, say):
    def hang(_request: object, context: grpc.ServicerContext) -> service_pb2.GetModelResponse:
        while context.is_active():
            time.sleep(0.01)
        return service_pb2.GetModelResponse()

    server.script.on("GetModel", hang)
    with unslothd.Client(server.target, timeout=0.2) as client, pytest.raises(errors.DeadlineExceeded, match="timeout"):
        client.get_model("m")


def test_details_of_another_domain_are_no_reason():
    status = training_pb2.Training().error
    status.code = grpc.StatusCode.UNAVAILABLE.value[0]
    status.details.add().Pack(errors.ErrorInfo(reason="ROUTE", domain="proxy.example"))
    assert errors.from_status(status).reason == ""


def test_metadata_goes_with_every_call(server, say):
    server.script.on("GetServerInfo", say.answer(service_pb2.GetServerInfoResponse()))
    server.script.on("Train", say.events(say.succeeded(1)))
    with unslothd.Client(server.target, metadata={"authorization": "Bearer x"}) as client:
        client.server_info()
        client.train("m", [{"text": "a"}]).result()
    assert [each["authorization"] for each in server.script.metadata] == ["Bearer x", "Bearer x"]
