"""What agents may not do: change with --read-only, go beyond a budget, destroy without a yes, read any file."""

from pathlib import Path

import anyio
import pytest
from mcp_types import ElicitRequestParams, ElicitResult

from doubles.gates import StepGate
from support.mcp_agents import Agent, agent, agent_inside, reached, scripted_row
from support.running_server import RunningServer
from unslothd_mcp.app import TOOLS

pytestmark = pytest.mark.anyio
ROWS = [{"text": "a"}]


async def waiting(host: Agent, model_id: str, gate: StepGate) -> str:
    """A training that waits at step 2."""
    gate.open(1)
    rows = [scripted_row(steps=50, gate=str(gate))]
    started = await host.call("unsloth_train", model_id=model_id, train_dataset=rows, wait=False)
    await reached(gate, 2)
    return started["training_id"]


async def test_read_only_offers_and_does_only_what_changes_nothing(server: RunningServer, model_id: str):
    async with agent(server.target, "--read-only") as host:
        tools = (await host.client.list_tools()).tools
        assert all(tool.annotations.read_only_hint for tool in tools)
        assert {tool.name for tool in tools} == {tool.name for tool in TOOLS if tool.read_only}
        for tool in TOOLS:
            if not tool.read_only:
                assert (await host.error(tool.name))["reason"] == "READ_ONLY"
        assert model_id in await host.call("unsloth_list_models")


@pytest.mark.parametrize("config", [{"max_steps": 11}, {"num_train_epochs": 1}])
async def test_no_training_has_more_steps_than_the_budget(server: RunningServer, model_id: str, config: dict):
    async with agent_inside(server.target, max_steps=10) as host:
        for tool, arguments in (
            ("unsloth_prepare_for_training", {}),
            ("unsloth_train", {"train_dataset": ROWS}),
        ):
            error = await host.error(tool, model_id=model_id, training_config=config, **arguments)
            assert error["reason"] == "BUDGET_STEPS"
            assert error["fields"][0]["field"] == f"training_config.{next(iter(config))}"


async def test_a_model_that_others_prepared_beyond_the_budget_is_not_trained(
    server: RunningServer, model_id: str, gate: StepGate
):
    async with agent_inside(server.target, max_steps=2) as host:  # it was prepared with 3
        rows = [scripted_row(gate=str(gate))]
        error = await host.error("unsloth_train", model_id=model_id, train_dataset=rows)
        assert error["reason"] == "BUDGET_STEPS"
        (training,) = (await host.call("unsloth_list_trainings", limit=1))["trainings"]
        end = await host.call("unsloth_watch_training", training_id=training["training_id"])
        assert (end["state"], end["step"]) == ("cancelled", 0)
        config = {"max_steps": 2}
        await host.call("unsloth_train", model_id=model_id, train_dataset=ROWS, training_config=config)
        error = await host.error("unsloth_resume_training", training_id=training["training_id"])
        assert error["reason"] == "BUDGET_STEPS"


async def test_minutes_that_are_used_up_stop_what_runs_and_start_nothing(
    server: RunningServer, model_id: str, gate: StepGate
):
    async with agent_inside(server.target, max_gpu_minutes=0.001) as host:
        gate.open(1)
        rows = [scripted_row(steps=50, gate=str(gate))]
        with anyio.fail_after(60):
            error = await host.error("unsloth_train", model_id=model_id, train_dataset=rows)
        assert error["reason"] == "BUDGET_MINUTES"
        assert (await host.error("unsloth_train", model_id=model_id, train_dataset=ROWS))["reason"] == "BUDGET_MINUTES"
        (training,) = (await host.call("unsloth_list_trainings", limit=1))["trainings"]
        seen = await host.call("unsloth_get_training", training_id=training["training_id"])
        assert (seen["state"], [each["step"] for each in seen["checkpoints"]]) == ("cancelled", [1])
        info = await host.call("unsloth_server_info")
        assert info["adapter"]["used_gpu_minutes"] >= 0.001
    async with agent_inside(server.target, max_gpu_minutes=5) as other:  # another budget
        await other.call("unsloth_train", model_id=model_id, train_dataset=ROWS)
        error = await other.error("unsloth_resume_training", training_id=training["training_id"])
        assert error["reason"] == "BUDGET_MINUTES"


async def test_unloading_under_a_training_needs_the_value_bound_to_what_was_shown(
    server: RunningServer, model_id: str, gate: StepGate
):
    async with agent_inside(server.target) as host:
        training_id = await waiting(host, model_id, gate)
        assert (await host.error("unsloth_unload_model", model_id=model_id))["reason"] == "MODEL_BUSY"
        shown = await host.error("unsloth_unload_model", model_id=model_id, force=True)
        assert (shown["reason"], shown["would_lose"]["cancels"]) == ("CONFIRMATION_NEEDED", [training_id])
        wrong = await host.error("unsloth_unload_model", model_id=model_id, force=True, confirm="0" * 16)
        assert (wrong["reason"], wrong["confirm"]) == ("CONFIRMATION_STALE", shown["confirm"])
        more = await host.call("unsloth_train", model_id=model_id, train_dataset=ROWS, wait=False)
        stale = await host.error("unsloth_unload_model", model_id=model_id, force=True, confirm=shown["confirm"])
        assert stale["reason"] == "CONFIRMATION_STALE"
        assert stale["would_lose"]["cancels"] == sorted([training_id, more["training_id"]])
        await host.call("unsloth_unload_model", model_id=model_id, force=True, confirm=stale["confirm"])
        assert model_id not in await host.call("unsloth_list_models")
        await host.call("unsloth_load_model", model_name="tiny")  # for the fixture to unload


async def test_going_back_to_an_earlier_checkpoint_shows_the_later_ones_that_it_removes(
    server: RunningServer, model_id: str, gate: StepGate
):
    async with agent_inside(server.target) as host:
        gate.open(1, 2, 3)
        rows, config = [scripted_row(steps=9, gate=str(gate))], {"save_steps": 1}
        started = await host.call(
            "unsloth_train", model_id=model_id, train_dataset=rows, training_config=config, wait=False
        )
        training_id = started["training_id"]
        await reached(gate, 4)
        await host.call("unsloth_cancel_training", training_id=training_id)
        await host.call("unsloth_watch_training", training_id=training_id)
        shown = await host.error("unsloth_resume_training", training_id=training_id, checkpoint_step=1)
        assert shown["would_lose"]["removes_checkpoints"] == [2, 3]
        gate.open_all()
        confirm = shown["confirm"]
        resumed = await host.call(
            "unsloth_resume_training", training_id=training_id, checkpoint_step=1, confirm=confirm
        )
        end = await host.call(
            "unsloth_watch_training", training_id=training_id, after_sequence=resumed["last_sequence"]
        )
        assert end["state"] == "succeeded"


async def test_cancelling_without_a_checkpoint_asks_but_with_one_does_not(
    server: RunningServer, model_id: str, gate: StepGate
):
    async with agent_inside(server.target) as host:
        training_id = await waiting(host, model_id, gate)
        arguments = {"training_id": training_id, "save_checkpoint": False}
        shown = await host.error("unsloth_cancel_training", **arguments)
        assert shown["reason"] == "CONFIRMATION_NEEDED"
        done = await host.call("unsloth_cancel_training", **arguments, confirm=shown["confirm"])
        assert done["state"] in {"cancelling", "cancelled"}
        end = await host.call("unsloth_watch_training", training_id=training_id)
        assert (end["state"], end["events"][-1]["data"].get("output_dir", "")) == ("cancelled", "")


@pytest.mark.parametrize("mode", ["legacy", "auto"])
@pytest.mark.parametrize("agrees", [True, False])
async def test_a_host_that_can_ask_its_user_is_asked(
    server: RunningServer, model_id: str, gate: StepGate, mode: str, agrees: bool
):
    questions: list[str] = []

    async def answer(_: object, params: ElicitRequestParams) -> ElicitResult:
        questions.append(params.message)
        return ElicitResult(action="accept", content={"go_ahead": agrees})

    async with agent_inside(server.target, mode, client={"elicitation_callback": answer}) as host:
        training_id = await waiting(host, model_id, gate)
        result = await host.result("unsloth_cancel_training", training_id=training_id, save_checkpoint=False)
        assert len(questions) == 1
        assert training_id in questions[0]
        seen = await host.call("unsloth_get_training", training_id=training_id)
        if agrees:
            assert not result.is_error
            assert seen["state"] in {"cancelling", "cancelled"}
        else:
            assert result.structured_content["reason"] == "DECLINED"
            assert seen["state"] == "running"
        gate.open_all()


async def test_files_are_read_below_the_allowed_roots_only(server: RunningServer, model_id: str, tmp_path: Path):
    (tmp_path / "in").mkdir()
    good, bad = tmp_path / "in" / "rows.jsonl", tmp_path / "rows.jsonl"
    for file in (good, bad):
        file.write_text('{"text": "a"}\n{"text": "b"}\n')
    (tmp_path / "in" / "link.jsonl").symlink_to(bad)
    async with agent_inside(server.target, allowed_roots=(tmp_path / "in",)) as host:
        stored = await host.call("unsloth_upload_dataset", file=str(good), name="two rows")
        assert (stored["num_rows"], stored["columns"], stored["name"]) == (2, ["text"], "two rows")
        assert stored["dataset_id"] in stored["next_step"]
        for path in (bad, tmp_path / "in" / "link.jsonl", tmp_path / "in" / ".." / "rows.jsonl", tmp_path / "in"):
            error = await host.error("unsloth_upload_dataset", file=str(path))
            assert (error["code"], error["reason"]) == ("PERMISSION_DENIED", "FILE_NOT_ALLOWED")
        trained = await host.call("unsloth_train", model_id=model_id, train_dataset={"file": str(good)})
        assert trained["state"] == "succeeded"
        await host.call("unsloth_train", model_id=model_id, train_dataset=stored["dataset_id"])
    async with agent_inside(server.target) as host:
        error = await host.error("unsloth_train", model_id=model_id, train_dataset={"file": str(good)})
        assert error["reason"] == "FILE_NOT_ALLOWED"


async def test_a_read_only_adapter_serves_no_tasks(server: RunningServer):
    async with agent_inside(server.target, read_only=True) as host:
        assert not host.client.server_capabilities.extensions
