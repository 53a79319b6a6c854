"""Real Unsloth on this CPU: an agent with nothing but tools and their errors gets to an exported adapter."""

import json
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest

from support.mcp_agents import Agent, agent, http_adapter, http_agent
from support.running_server import RunningServer
from support.tiny_model import build_tiny_llama

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(600)]
STEPS = 4
# Neither column is one that a layout has.
ROWS = [{"ask": f"What is {n} plus {n}?", "say": f" It is {2 * n}."} for n in range(12)]


@pytest.fixture(scope="module")
def real_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    with RunningServer(tmp_path_factory.mktemp("real")) as running:
        build_tiny_llama(running.model_root / "tiny")
        too_large(running.model_root / "huge")
        yield running


def too_large(folder: Path) -> None:
    """A model of 20 TB, or so its header says."""
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    header = json.dumps({"w": {"dtype": "BF16", "shape": [10**6, 10**7], "data_offsets": [0, 0]}}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)


class Beginner:
    """An agent that calls what it wants, and when that fails the first tool of next_step that it can do something with.

    Args:
        host: Its tools.
    """

    def __init__(self, host: Agent) -> None:
        self.host = host
        self.reasons: list[str] = []
        self.model_id = "tiny-unsloth"  # a guess
        self.models = ["huge", "tiny"]
        self.train = {"train_dataset": ROWS[:8], "eval_dataset": ROWS[8:], "training_config": {"max_steps": STEPS}}

    async def wants(self, tool: str) -> dict[str, Any]:
        """Calls a tool until it succeeds, doing what the errors say in between."""
        for _ in range(6):
            result = await self.host.result(tool, **self.arguments(tool))
            answer = result.structured_content or {}
            if not result.is_error:
                self.model_id = answer.get("model_id", self.model_id)
                return answer
            self.reasons.append(answer["reason"])
            await self.heed(answer, tool)
        raise AssertionError(f"no way to {tool}: {answer}")

    def arguments(self, tool: str) -> dict[str, Any]:
        if tool == "unsloth_load_model":
            return {"model_name": self.models[0], "max_seq_length": 128}
        return {"model_id": self.model_id} | (self.train if tool in {"unsloth_train", "unsloth_plan_training"} else {})

    async def heed(self, error: dict[str, Any], tool: str) -> None:
        for named in re.findall(r"unsloth_[a-z_]+", error["next_step"]):
            if named == "unsloth_list_models" and not await self.host.call(named):
                continue  # nothing is loaded that could be unloaded
            if named == "unsloth_unload_model":
                continue
            if named == "unsloth_load_model" and "smaller model" in error["next_step"]:
                self.models.pop(0)
                return
            if named == "unsloth_plan_training" and "template" in error["next_step"]:
                self.train["template"] = "{ask}{say}"
                await self.host.call(named, **self.arguments(named))
                return
            if named != tool:
                await self.wants(named)
                return


async def a_cancelled_call_leaves_a_checkpoint(host: Agent, model_id: str) -> None:
    endless = {"max_steps": 100_000, "save_steps": 100_000}
    host.progress.clear()
    async with host.calling(
        "unsloth_train", model_id=model_id, train_dataset=[{"text": "again and again"}], training_config=endless
    ):
        with anyio.fail_after(60):
            while len(host.progress) < 2:  # noqa: ASYNC110 - the SDK's client calls back, it has no event
                await anyio.sleep(0.01)
    (training,) = (await host.call("unsloth_list_trainings", limit=1))["trainings"]
    end = await host.call("unsloth_watch_training", training_id=training["training_id"], max_events=500)
    assert (end["state"], end["step"] >= 2) == ("cancelled", True)
    (checkpoint,) = (await host.call("unsloth_get_training", training_id=training["training_id"]))["checkpoints"]
    assert checkpoint["step"] == end["step"]
    assert await anyio.Path(checkpoint["path"], "adapter_model.safetensors").is_file()


async def every_way_to_connect_trains(server: RunningServer, model_id: str, folder: Path) -> None:
    (folder / "tokens.txt").write_text("let-me-in")

    async def train(host: Agent) -> None:
        config = {"max_steps": 2}
        rows = [{"text": "again and again"}]
        await host.call("unsloth_train", model_id=model_id, train_dataset=rows, training_config=config)
        assert [done for done, total, _ in host.progress if total] == [1, 2]

    async with agent(server.target, mode="legacy") as host:
        await train(host)
    with http_adapter(server.target, folder / "tokens.txt") as url:
        for mode in ("auto", "legacy"):
            async with http_agent(url, "let-me-in", mode) as host:
                await train(host)


async def test_a_beginner_gets_to_an_exported_adapter_by_doing_what_the_errors_say(
    real_server: RunningServer, tmp_path: Path
):
    async with agent(real_server.target) as host:
        beginner = Beginner(host)
        trained = await beginner.wants("unsloth_train")
        assert beginner.reasons == [
            "MODEL_NOT_FOUND",  # nothing was loaded
            "INSUFFICIENT_MEMORY",  # the first model is too large
            "MODEL_NOT_PREPARED",
            "DATASET_COLUMNS",
        ]
        model_id = beginner.model_id
        metrics = trained["metrics"]
        names = {"train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss", "epoch"}
        assert names <= set(metrics)
        assert 0 < metrics["train_loss"] < 20
        assert metrics["train_runtime"] > 0
        assert [done for done, total, _ in host.progress if total == STEPS] == [1, 2, 3, 4]
        assert trained["output_dir"].endswith("/final")
        made = await host.call("unsloth_generate", model_id=model_id, prompt="What is 2", max_new_tokens=4)
        assert 1 <= made["completion_tokens"] <= 4
        await a_cancelled_call_leaves_a_checkpoint(host, model_id)
        await every_way_to_connect_trains(real_server, model_id, tmp_path)
        files = await host.call("unsloth_export_model", training_id=trained["training_id"])
        assert "adapter_model.safetensors" in {each["name"] for each in files["files"]}
        assert await anyio.Path(files["path"], "adapter_model.safetensors").is_file()
        uri = f"unslothd://trainings/{trained['training_id']}/receipt"
        (receipt,) = (await host.client.read_resource(uri)).contents
        assert json.loads(receipt.text)["training_id"] == trained["training_id"]
        assert await host.call("unsloth_list_models")
        await host.call("unsloth_unload_model", model_id=model_id)
        assert await host.call("unsloth_list_models") == {}
