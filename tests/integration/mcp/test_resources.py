"""Resources and prompts, as hosts read and offer them."""

import json
import re

import pytest
from mcp.shared.exceptions import MCPError

from support.mcp_agents import Agent, agent, agent_inside, scripted_row
from support.running_server import RunningServer

pytestmark = pytest.mark.anyio


async def read(host: Agent, uri: str):
    (content,) = (await host.client.read_resource(uri)).contents
    assert content.mime_type == "application/json"
    return json.loads(content.text)


async def test_everything_is_listed(server: RunningServer):
    async with agent(server.target) as host:
        resources = {str(each.uri) for each in (await host.client.list_resources()).resources}
        assert resources == {f"unslothd://{name}" for name in ("server", "models", "trainings", "datasets")}
        templates = {each.uri_template for each in (await host.client.list_resource_templates()).resource_templates}
        assert templates == {
            "unslothd://trainings/{training_id}",
            "unslothd://trainings/{training_id}/events{?after_sequence}",
            "unslothd://trainings/{training_id}/receipt",
            "unslothd://datasets/{dataset_id}",
        }
        prompts = {each.name for each in (await host.client.list_prompts()).prompts}
        assert prompts == {"fine_tune", "diagnose_training"}


async def test_a_training_its_log_and_the_lists_are_read(server: RunningServer, model_id: str):
    async with agent_inside(server.target) as host:
        trained = await host.call("unsloth_train", model_id=model_id, train_dataset=[{"text": "a"}])
        training_id = trained["training_id"]
        training = await read(host, f"unslothd://trainings/{training_id}")
        assert (training["state"], training["metrics"]["train_loss"]) == ("succeeded", 1.0)
        log = await read(host, f"unslothd://trainings/{training_id}/events")
        assert [event["sequence"] for event in log["events"]] == list(range(1, training["last_sequence"] + 1))
        assert not log["more"]
        tail = await read(host, f"unslothd://trainings/{training_id}/events?after_sequence=4")
        assert tail["events"] == log["events"][4:]
        assert training_id in {each["training_id"] for each in await read(host, "unslothd://trainings")}
        assert model_id in await read(host, "unslothd://models")
        assert (await read(host, "unslothd://server"))["devices"]


async def test_a_stored_dataset_is_read_by_its_id(server: RunningServer):
    async with agent_inside(server.target) as host:
        stored = await host.call("unsloth_upload_dataset", rows=[{"text": "kept"}], name="kept")
        dataset = await read(host, f"unslothd://datasets/{stored['dataset_id']}")
        assert (dataset["name"], dataset["num_rows"]) == ("kept", 1)
        assert dataset in await read(host, "unslothd://datasets")
        assert dataset in (await host.call("unsloth_list_datasets"))["datasets"]


async def test_what_is_not_there_says_so(server: RunningServer, model_id: str):
    async with agent_inside(server.target) as host:
        trained = await host.call("unsloth_train", model_id=model_id, train_dataset=[{"text": "a"}])
        for uri in (
            "unslothd://trainings/nobody",
            "unslothd://trainings/nobody/events",
            f"unslothd://trainings/{trained['training_id']}/receipt",  # scripted engines write none
        ):
            with pytest.raises(MCPError, match=r"(?i)\bno\b"):
                await host.client.read_resource(uri)


async def test_the_guided_fine_tune_names_only_tools_that_there_are(server: RunningServer):
    async with agent_inside(server.target) as host:
        prompt = await host.client.get_prompt("fine_tune", {"goal": "answer like a pirate", "dataset": "a/b"})
        text = prompt.messages[0].content.text
        assert "answer like a pirate" in text
        assert "The rows are in a/b." in text
        tools = {tool.name for tool in (await host.client.list_tools()).tools}
        named = set(re.findall(r"unsloth_[a-z]+[a-z_]*", text))
        assert "unsloth_train" in named
        assert named <= tools


async def test_the_diagnosis_holds_the_error_and_the_end_of_the_log(server: RunningServer, model_id: str):
    async with agent_inside(server.target) as host:
        rows = [scripted_row(die_at_step=2, die="disk_full")]
        error = await host.error("unsloth_train", model_id=model_id, train_dataset=rows)
        prompt = await host.client.get_prompt("diagnose_training", {"training_id": error["training_id"]})
        text = prompt.messages[0].content.text
        assert "DISK_FULL" in text
        assert "step 1/3" in text
