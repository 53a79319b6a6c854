"""What agents read when something is wrong: the code, a reason, every wrong field, and which tool to call next."""

import json

import pytest

from support.mcp_agents import Agent, agent, agent_inside, scripted_row
from support.running_server import RunningServer

pytestmark = pytest.mark.anyio
SECRET = "hf_this_is_a_secret_token"
ROWS = [{"text": "a"}]


def fields(error: dict) -> list[str]:
    return sorted(each["field"] for each in error["fields"])


@pytest.mark.parametrize("mode", ["legacy", "auto"])
async def test_an_error_has_its_parts_as_structured_content_and_as_text(server: RunningServer, mode: str):
    async with agent(server.target, mode=mode) as host:
        result = await host.result("unsloth_prepare_for_training", model_id="nobody")
        assert result.is_error
        assert result.structured_content == json.loads(result.content[0].text)
        assert result.structured_content["code"] == "NOT_FOUND"
        assert result.structured_content["reason"] == "MODEL_NOT_FOUND"
        assert "unsloth_list_models" in result.structured_content["next_step"]


async def test_every_wrong_field_is_named_at_once_by_the_server(server: RunningServer, model_id: str):
    async with agent_inside(server.target) as host:
        config = {"learning_rate": 5, "batch_size": 0, "optim": "nonsense"}
        error = await host.error("unsloth_prepare_for_training", model_id=model_id, training_config=config)
        assert (error["code"], error["reason"]) == ("INVALID_ARGUMENT", "INVALID_FIELD")
        assert fields(error) == [f"training_config.{name}" for name in ("batch_size", "learning_rate", "optim")]


async def test_every_wrong_field_is_named_at_once_by_the_adapter(server: RunningServer):
    async with agent_inside(server.target) as host:
        config = {"max_step": 3, "seed": "x"}
        error = await host.error("unsloth_train", model_id=[], train_dataset=ROWS, training_config=config)
        assert fields(error) == ["model_id", "training_config.max_step", "training_config.seed"]
        assert error["next_step"] == "Correct what `message` and `fields` name, then call unsloth_train again."


async def test_an_argument_that_does_not_exist_is_named_with_the_nearest_one(server: RunningServer, model_id: str):
    async with agent_inside(server.target) as host:
        error = await host.error("unsloth_train", model_id=model_id, train_datasets=ROWS, train_dataset=ROWS)
        assert fields(error) == ["train_datasets"]
        assert "Did you mean train_dataset?" in error["message"]


async def test_a_tool_that_does_not_exist_is_named_with_the_nearest_one(server: RunningServer):
    async with agent_inside(server.target, "legacy") as host:
        error = await host.error("unsloth_load")
        assert error["reason"] == "UNKNOWN_TOOL"


DATASETS = {
    "a number": 7,
    "a word": "word",
    "two at once": {"path": "/a.jsonl", "hub": "a/b"},
    "none": {"split": "train"},
    "texts": ["a", "b"],
    "a stranger": {"path": "/a.jsonl", "split": "train"},
    "no text": {"hub": 3},
    "rows that are none": {"rows": "a"},
}


@pytest.mark.parametrize("name", DATASETS)
async def test_what_is_no_dataset_is_answered_with_the_forms_that_are(server: RunningServer, name: str):
    async with agent_inside(server.target) as host:
        error = await host.error("unsloth_train", model_id="any", train_dataset=DATASETS[name])
        assert (error["reason"], fields(error)) == ("INVALID_FIELD", ["train_dataset"])
        assert '{"hub": "org/name"' in error["message"]


async def test_a_training_that_fails_is_an_error_with_its_id(server: RunningServer, model_id: str):
    async with agent_inside(server.target) as host:
        rows = [scripted_row(die_at_step=1, die="out_of_memory")]
        error = await host.error("unsloth_train", model_id=model_id, train_dataset=rows)
        assert (error["code"], error["reason"]) == ("RESOURCE_EXHAUSTED", "OUT_OF_MEMORY")
        assert "batch_size" in error["next_step"]
        seen = await host.call("unsloth_get_training", training_id=error["training_id"])
        assert (seen["state"], seen["error"]["reason"]) == ("failed", "OUT_OF_MEMORY")


async def test_a_server_that_is_not_there_is_told_as_such():
    async with agent_inside("127.0.0.1:1") as host:
        error = await host.error("unsloth_list_models")
        assert error["code"] == "UNAVAILABLE"
        assert "Tell the user" in error["next_step"]


async def test_a_hugging_face_token_never_comes_back(server: RunningServer, capfd: pytest.CaptureFixture[str]):
    async with agent(server.target) as host:
        for arguments in (
            {"model_name": "tiny"},
            {"model_name": f"/nowhere/{SECRET}"},
            {"model_name": "tiny", "max_seq_length": SECRET},
            {"model_name": "tiny", "dtype": SECRET},
            {"model_name": "tiny", "unknown": SECRET},
        ):
            result = await host.result("unsloth_load_model", token=SECRET, **arguments)
            assert SECRET not in result.model_dump_json()
        assert SECRET not in str(host.progress)
        await unload_all(host)
    written = capfd.readouterr()
    assert SECRET not in written.out + written.err + server.log.read_text()


async def unload_all(host: Agent) -> None:
    for model_id in await host.call("unsloth_list_models"):
        await host.call("unsloth_unload_model", model_id=model_id)
