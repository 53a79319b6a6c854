"""Generation, exports, uploads, what the server tells, and progress that has no steps."""

import json
from pathlib import Path

import anyio
import pytest

from support.mcp_agents import agent_inside
from support.running_server import RunningServer

pytestmark = pytest.mark.anyio


async def test_text_and_chats_are_gone_on_with(server: RunningServer, model_id: str):
    async with agent_inside(server.target) as host:
        made = await host.call("unsloth_generate", model_id=model_id, prompt="one two", max_new_tokens=3)
        assert (made["text"], made["completion_tokens"], made["finish_reason"]) == ("one two one ", 3, "length")
        chat = [{"role": "user", "content": "hello"}]
        made = await host.call("unsloth_generate", model_id=model_id, prompt=chat, max_new_tokens=1, stop=["x"])
        assert made["text"] == "hello "
        assert (await host.error("unsloth_generate", model_id=model_id, prompt=""))["reason"] == "INVALID_FIELD"


async def test_a_load_and_an_export_report_their_phases(server: RunningServer):
    async with agent_inside(server.target) as host:
        loaded = await host.call("unsloth_load_model", model_name="tiny", load_in_4bit=False, dtype="float32")
        assert [message for _, _, message in host.progress] == [
            "tiny: starting the worker",
            "tiny: loading the weights",
        ]
        assert [done for done, _, _ in host.progress] == [1, 2]
        host.progress.clear()
        files = await host.call("unsloth_export_model", model_id=loaded["model_id"], format="merged_16bit")
        assert "export: merging 0 of 2" in {message for _, _, message in host.progress}
        assert {each["name"] for each in files["files"]} == {"config.json", "model.safetensors"}
        assert await anyio.Path(files["path"], "config.json").is_file()
        assert files["artifact_id"] in files["next_step"]
        await host.call("unsloth_unload_model", model_id=loaded["model_id"])


async def test_an_export_names_one_source(server: RunningServer):
    async with agent_inside(server.target) as host:
        for arguments in ({}, {"training_id": "a", "model_id": "b"}):
            assert (await host.error("unsloth_export_model", **arguments))["fields"][0]["field"] == "training_id"


async def test_an_upload_has_rows_or_a_file_and_names_bad_rows(server: RunningServer):
    async with agent_inside(server.target) as host:
        for arguments in ({}, {"rows": [{"text": "a"}], "file": "/a.jsonl"}):
            assert (await host.error("unsloth_upload_dataset", **arguments))["reason"] == "INVALID_FIELD"
        same = [await host.call("unsloth_upload_dataset", rows=[{"n": 1}, {"n": 2}]) for _ in range(2)]
        assert same[0]["dataset_id"] == same[1]["dataset_id"]


async def test_the_server_and_the_adapter_tell_their_limits(server: RunningServer, tmp_path: Path):
    async with agent_inside(server.target, max_steps=9, max_gpu_minutes=3, allowed_roots=(tmp_path,)) as host:
        info = await host.call("unsloth_server_info")
        assert info["limits"]["max_loaded_models"] > 0
        assert info["devices"][0]["total_memory_bytes"] > 0
        assert info["adapter"] == {
            "read_only": False,
            "max_steps": 9,
            "max_gpu_minutes": 3,
            "allowed_roots": [str(tmp_path)],
            "used_gpu_minutes": 0.0,
        }


async def test_arguments_that_come_as_json_text_are_understood(server: RunningServer, model_id: str):
    async with agent_inside(server.target) as host:
        trained = await host.call(
            "unsloth_train",
            model_id=model_id,
            train_dataset=json.dumps([{"text": "a"}]),
            training_config=json.dumps({"max_steps": 1, "use_gradient_checkpointing": "unsloth", "eval_steps": None}),
        )
        seen = await host.call("unsloth_get_training", training_id=trained["training_id"])
        assert (seen["total_steps"], seen["config"]["use_gradient_checkpointing"]) == (1, True)
