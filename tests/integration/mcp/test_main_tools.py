"""The five tools, in both eras of the protocol: exact keys, live progress, defaults."""

import pytest

from support.mcp_agents import agent
from support.running_server import RunningServer

pytestmark = pytest.mark.anyio
ERAS = ["legacy", "auto"]


@pytest.mark.parametrize("mode", ERAS)
async def test_the_whole_job_has_exactly_the_promised_keys(server: RunningServer, mode: str):
    async with agent(server.target, mode=mode) as host:
        loaded = await host.call("unsloth_load_model", model_name="tiny")
        assert {"status", "model_id", "model_name", "max_seq_length", "dtype", "device"} <= set(loaded)
        assert (loaded["status"], loaded["model_name"], loaded["max_seq_length"]) == ("success", "tiny", 2048)
        model_id = loaded["model_id"]
        prepared = await host.call(
            "unsloth_prepare_for_training", model_id=model_id, training_config={"max_steps": 4, "fp16": None}
        )
        assert {"status", "message", "trainable_params", "total_params"} <= set(prepared)
        assert (prepared["trainable_params"], prepared["total_params"]) == (16_000, 1_000_000)
        host.progress.clear()
        trained = await host.call(
            "unsloth_train", model_id=model_id, train_dataset=[{"text": "a"}], eval_dataset=[{"text": "b"}]
        )
        assert {"status", "metrics", "output_dir"} <= set(trained)
        metrics = {"train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss", "epoch"}
        assert metrics <= set(trained["metrics"])
        assert [(done, total) for done, total, _ in host.progress] == [(1, 4), (2, 4), (3, 4), (4, 4)]
        assert host.progress[1][2] == "step 2/4, loss 1.0000, ETA 0.2 s"
        models = await host.call("unsloth_list_models")
        assert set(models[model_id]) >= {"config", "device"}
        assert set(models[model_id]["config"]) == {
            "model_name", "max_seq_length", "dtype", "load_in_4bit", "device_map",
        }  # fmt: skip
        unloaded = await host.call("unsloth_unload_model", model_id=model_id)
        assert (unloaded["status"], set(unloaded)) == ("success", {"status", "message", "next_step"})
        assert await host.call("unsloth_list_models") == {}
