"""Streamable HTTP: both eras, bearer tokens, several agents at a time on one adapter."""

import subprocess
import sys
from collections.abc import Iterator

import anyio
import httpx2
import pytest

from support.mcp_agents import adapter, http_adapter, http_agent
from support.running_server import RunningServer

pytestmark = pytest.mark.anyio
TOKEN = "let-me-in"


@pytest.fixture(scope="module")
def url(server: RunningServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    tokens = tmp_path_factory.mktemp("tokens") / "tokens.txt"
    tokens.write_text(f"# agents\nanother\n{TOKEN}\n")
    with http_adapter(server.target, tokens) as address:
        yield address


@pytest.mark.parametrize("mode", ["legacy", "auto"])
async def test_the_whole_job_runs_with_live_progress(url: str, mode: str):
    async with http_agent(url, TOKEN, mode) as host:
        loaded = await host.call("unsloth_load_model", model_name="tiny")
        config = {"max_steps": 5}
        await host.call("unsloth_prepare_for_training", model_id=loaded["model_id"], training_config=config)
        host.progress.clear()
        await host.call("unsloth_train", model_id=loaded["model_id"], train_dataset=[{"text": "a"}])
        assert [done for done, _, _ in host.progress] == [1, 2, 3, 4, 5]
        await host.call("unsloth_unload_model", model_id=loaded["model_id"])


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer wrong"}])
async def test_nobody_is_let_in_without_a_token(url: str, headers: dict[str, str]):
    async with httpx2.AsyncClient(headers=headers) as http:
        assert (await http.post(url, json={})).status_code == 401


async def test_five_agents_train_at_the_same_time(url: str):
    async def job(mode: str) -> None:
        async with http_agent(url, TOKEN, mode) as host:
            loaded = await host.call("unsloth_load_model", model_name="tiny")
            await host.call("unsloth_prepare_for_training", model_id=loaded["model_id"])
            host.progress.clear()
            config = {"max_steps": 20}
            rows = [{"text": "a"}]
            await host.call("unsloth_train", model_id=loaded["model_id"], train_dataset=rows, training_config=config)
            assert [done for done, _, _ in host.progress] == list(range(1, 21))
            await host.call("unsloth_unload_model", model_id=loaded["model_id"])

    with anyio.fail_after(120):
        async with anyio.create_task_group() as group:
            for mode in ("auto", "legacy", "auto", "legacy", "auto"):
                group.start_soon(job, mode)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--http", "0.0.0.0:0"], "--http-token-file"),
        (["--http", "nonsense"], "HOST:PORT"),
        (["--http", "127.0.0.1:0", "--http-token-file", "/dev/null"], "holds no token"),
        (["--allowed-root", "/no/such/folder"], "is no folder here"),
        (["--max-steps", "0"], "at least 1"),
        (["--read-only", "--allowed-root", "."], "uploads no files"),
    ],
)
def test_wrong_usage_is_refused_with_what_is_right(arguments: list[str], said: str):
    start = adapter("127.0.0.1:1", *arguments)
    command = [sys.executable, *start.args]
    done = subprocess.run(command, check=False, env=start.env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert said in done.stderr
