"""The tasks extension: unsloth_train answers with a task whose id is the training's, for hosts that speak it."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Literal

import anyio
import pytest
from mcp.client.extension import ClientExtension, ResultClaim, UnexpectedClaimedResult
from mcp.shared.exceptions import MCPError
from mcp_types import CancelTaskRequest, CancelTaskRequestParams, GetTaskRequest, GetTaskRequestParams, Result

from doubles.gates import StepGate
from support.calls import watch
from support.mcp_agents import Agent, agent, reached, scripted_row
from support.running_server import RunningServer
from unslothd.v1.service_pb2_grpc import UnslothServiceStub
from unslothd_mcp.tasks import EXTENSION

pytestmark = pytest.mark.anyio


class TaskAnswer(Result):
    """A task, or what tasks/get says of it."""

    model_config = Result.model_config | {"extra": "allow"}
    result_type: Literal["task"] = "task"
    task_id: str
    status: str


class AnyAnswer(Result):
    """What tasks/get and tasks/cancel answer."""

    model_config = Result.model_config | {"extra": "allow"}


class Tasks(ClientExtension):
    """A host that speaks the extension and looks at its tasks itself."""

    identifier = EXTENSION

    def claims(self):
        async def never(*_: Any) -> Any:
            raise AssertionError("the tests resolve tasks themselves")

        return [ResultClaim(result_type="task", model=TaskAnswer, resolve=never)]


@asynccontextmanager
async def host_with_tasks(target: str) -> AsyncIterator[Agent]:
    async with agent(target, extensions=[Tasks()]) as host:
        yield host


async def begin(host: Agent, model_id: str, rows: list[dict]) -> TaskAnswer:
    arguments = {"model_id": model_id, "train_dataset": rows}
    task = await host.client.session.call_tool("unsloth_train", arguments, allow_claimed=True)
    assert isinstance(task, TaskAnswer)
    return task


async def get(host: Agent, task_id: str) -> dict[str, Any]:
    request = GetTaskRequest(params=GetTaskRequestParams(task_id=task_id))
    return (await host.client.session.send_request(request, AnyAnswer)).model_dump(by_alias=True)


def told_step(stub: UnslothServiceStub, training_id: str, step: int) -> None:
    """Returns once the server knows that this step was done; the worker knows it a moment before."""
    next(event for event in watch(stub, training_id) if event.step.step == step)


async def finished(host: Agent, task_id: str) -> dict[str, Any]:
    await host.call("unsloth_watch_training", training_id=task_id)
    return await get(host, task_id)


async def test_a_training_is_a_task_with_the_result_that_the_call_would_have_had(
    server: RunningServer, stub: UnslothServiceStub, model_id: str, gate: StepGate
):
    async with host_with_tasks(server.target) as host:
        gate.open(1)
        task = await begin(host, model_id, [scripted_row(steps=2, gate=str(gate))])
        assert (task.status, task.task_id[:9]) == ("working", "training-")
        await anyio.to_thread.run_sync(told_step, stub, task.task_id, 1)
        working = await get(host, task.task_id)
        assert (working["status"], working["ttlMs"], working["resultType"]) == ("working", None, "complete")
        assert working["statusMessage"].startswith("running")
        gate.open_all()
        done = await finished(host, task.task_id)
        assert done["status"] == "completed"
        assert done["result"]["structuredContent"]["metrics"]["train_loss"] == 1.0
        assert done["result"]["structuredContent"]["training_id"] == task.task_id


async def test_a_cancelled_task_keeps_a_checkpoint(server: RunningServer, model_id: str, gate: StepGate):
    async with host_with_tasks(server.target) as host:
        gate.open(1)
        task = await begin(host, model_id, [scripted_row(steps=50, gate=str(gate))])
        await reached(gate, 2)
        request = CancelTaskRequest(params=CancelTaskRequestParams(task_id=task.task_id))
        await host.client.session.send_request(request, AnyAnswer)
        assert (await finished(host, task.task_id))["status"] == "cancelled"
        seen = await host.call("unsloth_get_training", training_id=task.task_id)
        assert [each["step"] for each in seen["checkpoints"]] == [1]


async def test_a_failed_training_is_a_task_with_an_error_result(server: RunningServer, model_id: str):
    async with host_with_tasks(server.target) as host:
        task = await begin(host, model_id, [scripted_row(die_at_step=1, die="disk_full")])
        done = await finished(host, task.task_id)
        assert (done["status"], done["result"]["isError"]) == ("completed", True)
        assert done["result"]["structuredContent"]["reason"] == "DISK_FULL"


async def test_a_call_that_does_not_wait_or_is_refused_is_answered_at_once(
    server: RunningServer, model_id: str, gate: StepGate
):
    async with host_with_tasks(server.target) as host:
        rows = [scripted_row(gate=str(gate))]
        started = await host.call("unsloth_train", model_id=model_id, train_dataset=rows, wait=False)
        assert started["metrics"] is None
        error = await host.error("unsloth_train", model_id="nobody", train_dataset=[{"text": "a"}])
        assert error["reason"] == "MODEL_NOT_FOUND"


async def test_a_task_that_is_not_there_is_refused(server: RunningServer):
    async with host_with_tasks(server.target) as host:
        with pytest.raises(MCPError, match="nobody"):
            await get(host, "nobody")


async def test_hosts_that_do_not_speak_tasks_are_never_answered_with_one(server: RunningServer, model_id: str):
    async with agent(server.target) as host:
        try:
            trained = await host.call("unsloth_train", model_id=model_id, train_dataset=[{"text": "a"}])
        except UnexpectedClaimedResult:
            pytest.fail("a task came back")
        assert trained["state"] == "succeeded"
        with pytest.raises(MCPError, match=EXTENSION):
            await get(host, trained["training_id"])
