"""Trainings by tool calls: started without waiting, watched in pieces, planned, paused, resumed, cancelled."""

import pytest

from doubles.gates import StepGate
from support.mcp_agents import agent, agent_inside, reached, scripted_row
from support.running_server import RunningServer

pytestmark = pytest.mark.anyio


async def test_a_training_that_is_not_waited_for_is_watched_in_bounded_pieces(
    server: RunningServer, model_id: str, gate: StepGate
):
    async with agent_inside(server.target) as host:
        rows = [scripted_row(steps=4, gate=str(gate))]
        started = await host.call("unsloth_train", model_id=model_id, train_dataset=rows, wait=False)
        assert (started["metrics"], started["status"]) == (None, "success")
        assert "unsloth_watch_training" in started["next_step"]
        training_id = started["training_id"]
        gate.open(1, 2)
        seen, after = [], 0
        while not any(event["kind"] == "step" and event["data"]["step"] == 2 for event in seen):
            part = await host.call(
                "unsloth_watch_training",
                training_id=training_id, after_sequence=after, wait_seconds=30, max_events=1,
            )  # fmt: skip
            seen += part["events"]
            after = part["last_sequence"]
            assert not part["over"]
        short = await host.call(
            "unsloth_watch_training", training_id=training_id, after_sequence=after, wait_seconds=0.2
        )
        assert (short["events"], short["timed_out"], short["over"]) == ([], True, False)
        there = await host.call("unsloth_watch_training", training_id=training_id, wait_seconds=0)
        assert there["events"] == seen
        gate.open_all()
        rest = await host.call("unsloth_watch_training", training_id=training_id, after_sequence=after)
        seen += rest["events"]
        assert (rest["over"], rest["state"]) == (True, "succeeded")
        assert [event["sequence"] for event in seen] == list(range(1, len(seen) + 1))
        assert seen[-1]["kind"] == "succeeded"
        again = await host.call("unsloth_watch_training", training_id=training_id, after_sequence=rest["last_sequence"])
        assert (again["events"], again["over"]) == ([], True)


async def test_a_repeated_call_with_its_request_id_attaches_to_the_first_training(server: RunningServer, model_id: str):
    async with agent_inside(server.target) as host:
        arguments = {"model_id": model_id, "train_dataset": [{"text": "a"}], "request_id": "run-1"}
        first = await host.call("unsloth_train", **arguments)
        assert (await host.call("unsloth_train", **arguments))["training_id"] == first["training_id"]


async def test_a_plan_shows_what_a_training_would_do_and_does_nothing(server: RunningServer, model_id: str):
    async with agent_inside(server.target) as host:
        before = await host.call("unsloth_list_trainings", model_id=model_id)
        plan = await host.call(
            "unsloth_plan_training",
            model_id=model_id, train_dataset=[{"text": "a"}] * 5, training_config={"max_steps": 7}, preview_rows=2,
        )  # fmt: skip
        assert (plan["status"], plan["num_rows"], plan["total_steps"]) == ("success", 5, 7)
        assert plan["preview"] == ["row 1", "row 2"]
        assert await host.call("unsloth_list_trainings", model_id=model_id) == before


async def test_a_paused_training_tells_its_waiting_call_and_goes_on_when_resumed(
    server: RunningServer, model_id: str, gate: StepGate
):
    async with agent_inside(server.target) as host, agent_inside(server.target) as other:
        rows = [scripted_row(steps=4, gate=str(gate))]
        gate.open(1, 2)
        started = await host.call("unsloth_train", model_id=model_id, train_dataset=rows, wait=False, request_id="p-1")
        training_id = started["training_id"]
        await reached(gate, 3)
        await other.call("unsloth_pause_training", training_id=training_id)
        error = await host.error("unsloth_train", model_id=model_id, train_dataset=rows, request_id="p-1")
        assert (error["reason"], error["training_id"]) == ("TRAINING_PAUSED", training_id)
        assert "unsloth_resume_training" in error["next_step"]
        rested = await host.call("unsloth_watch_training", training_id=training_id)
        assert (rested["state"], rested["over"]) == ("paused", False)
        assert rested["next_step"].startswith("Call unsloth_resume_training")
        gate.open_all()
        resumed = await other.call("unsloth_resume_training", training_id=training_id)
        end = await host.call(
            "unsloth_watch_training", training_id=training_id, after_sequence=resumed["last_sequence"]
        )
        assert (end["state"], end["step"]) == ("succeeded", 4)
        again = await host.call("unsloth_train", model_id=model_id, train_dataset=rows, request_id="p-1")
        assert (again["training_id"], again["state"]) == (training_id, "succeeded")


async def test_a_cancelled_training_keeps_a_checkpoint_and_ends_the_waiting_call(
    server: RunningServer, model_id: str, gate: StepGate
):
    async with agent_inside(server.target) as host:
        gate.open(1)
        rows = [scripted_row(steps=50, gate=str(gate))]
        started = await host.call("unsloth_train", model_id=model_id, train_dataset=rows, wait=False, request_id="c-1")
        await reached(gate, 2)
        await host.call("unsloth_cancel_training", training_id=started["training_id"])
        error = await host.error("unsloth_train", model_id=model_id, train_dataset=rows, request_id="c-1")
        assert (error["code"], error["reason"]) == ("ABORTED", "TRAINING_CANCELLED")
        assert error["training_id"] == started["training_id"]
        seen = await host.call("unsloth_get_training", training_id=started["training_id"])
        assert (seen["state"], [each["step"] for each in seen["checkpoints"]]) == ("cancelled", [1])


@pytest.mark.parametrize("mode", ["legacy", "auto"])
async def test_cancelling_the_call_cancels_the_training_with_a_checkpoint(
    server: RunningServer, model_id: str, gate: StepGate, mode: str
):
    rows = [scripted_row(steps=50, gate=str(gate))]
    gate.open(1)
    async with agent(server.target, mode=mode) as host:
        async with host.calling("unsloth_train", model_id=model_id, train_dataset=rows):
            await reached(gate, 2)
        (training,) = (await host.call("unsloth_list_trainings", limit=1))["trainings"]
        end = await host.call("unsloth_watch_training", training_id=training["training_id"])
        assert end["state"] == "cancelled"
        seen = await host.call("unsloth_get_training", training_id=training["training_id"])
        assert [each["step"] for each in seen["checkpoints"]] == [1]


@pytest.mark.parametrize("mode", ["legacy", "auto"])
async def test_a_detached_training_goes_on_when_its_call_is_cancelled(
    server: RunningServer, model_id: str, gate: StepGate, mode: str
):
    rows = [scripted_row(steps=3, gate=str(gate))]
    async with agent(server.target, mode=mode) as host:
        async with host.calling("unsloth_train", model_id=model_id, train_dataset=rows, on_cancel="detach"):
            await reached(gate, 1)
        gate.open_all()
        (training,) = (await host.call("unsloth_list_trainings", limit=1))["trainings"]
        end = await host.call("unsloth_watch_training", training_id=training["training_id"])
        assert end["state"] == "succeeded"


async def test_a_host_that_closes_the_connection_cancels_what_it_waits_for(
    server: RunningServer, model_id: str, gate: StepGate
):
    rows = [scripted_row(steps=50, gate=str(gate))]
    gate.open(1)
    async with agent(server.target) as host, host.calling("unsloth_train", model_id=model_id, train_dataset=rows):
        await reached(gate, 2)
    async with agent_inside(server.target) as other:
        (training,) = (await other.call("unsloth_list_trainings", limit=1))["trainings"]
        end = await other.call("unsloth_watch_training", training_id=training["training_id"])
        assert end["state"] == "cancelled"


async def test_what_goes_on_before_the_first_step_is_told(server: RunningServer, model_id: str):
    async with agent(server.target) as host:
        rows = [scripted_row(preparing=2, steps=1)]
        await host.call("unsloth_train", model_id=model_id, train_dataset=rows)
        assert host.progress == [
            (0.5, None, "reading rows: 1 000 so far"),
            (pytest.approx(2 / 3), None, "reading rows: 2 000 so far"),
            (1, 1, "step 1/1, loss 2.0000, ETA 0.0 s"),
        ]


async def test_a_host_that_asks_for_no_progress_gets_the_same_result(server: RunningServer, model_id: str):
    async with agent(server.target) as host:
        arguments = {"model_id": model_id, "train_dataset": [{"text": "a"}]}
        result = await host.client.call_tool("unsloth_train", arguments)
        assert result.structured_content["metrics"]["train_loss"] == 1.0
