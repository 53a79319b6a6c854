"""The job of the demo by MCP tool calls, on a server that runs already: what an agent's host sends and gets back.

unslothd serve --home .demo/home --output-root .demo/output --model-root .demo/models   # in another terminal
python examples/mcp_agent.py
"""

import json
import sys
from typing import Any

import anyio
import trivia
from mcp.client import Client
from mcp.client.stdio import StdioServerParameters, stdio_client

target = sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:50051"
train_rows, eval_rows = trivia.rows()
LONGEST = 160


async def main() -> None:
    """Loads, plans, trains, asks, exports, unloads."""
    adapter = StdioServerParameters(command=sys.executable, args=["-m", "unslothd_mcp", "--target", target])
    async with Client(stdio_client(adapter)) as host:
        loaded = await call(
            host, "unsloth_load_model", model_name="SmolLM2-135M-Instruct.Q4_1.gguf", max_seq_length=256
        )
        model_id = loaded["model_id"]
        config = {"learning_rate": 2e-4, "batch_size": 8, "gradient_accumulation_steps": 1, "max_steps": 10}
        # Too early: the answer says what to do.
        await call(host, "unsloth_train", model_id=model_id, train_dataset=train_rows)
        await call(
            host, "unsloth_prepare_for_training", model_id=model_id, training_config=config | {"warmup_steps": 2}
        )
        stored = await call(host, "unsloth_upload_dataset", rows=train_rows, name="trivia")
        data = {"model_id": model_id, "train_dataset": stored["dataset_id"]}
        await call(host, "unsloth_plan_training", preview_rows=1, **data)
        trained = await call(host, "unsloth_train", eval_dataset=eval_rows, **data)
        chat = [{"role": "user", "content": trivia.QUESTIONS[0]}]
        await call(host, "unsloth_generate", model_id=model_id, prompt=chat, max_new_tokens=24)
        await call(host, "unsloth_export_model", training_id=trained["training_id"])
        await call(host, "unsloth_unload_model", model_id=model_id)


async def call(host: Client, tool: str, **arguments: Any) -> dict[str, Any]:
    """Calls a tool, and prints both sides and the progress between them."""
    print(f"→ {tool}({', '.join(f'{name}={short(value)}' for name, value in arguments.items())})", flush=True)

    async def show(done: float, total: float | None, message: str | None) -> None:
        print(f"    {done:g}/{total:g}  {message}" if total else f"    {message}", flush=True)

    result = await host.call_tool(tool, arguments, progress_callback=show)
    content = result.structured_content or {}
    print("← error" if result.is_error else "←")
    for name, value in content.items():
        print(f"    {name}: {short(value)}")
    print(flush=True)
    return content


def short(value: object) -> str:
    """Returns a value as JSON of one line, its middle left out where it is long."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= LONGEST else f"{text[: LONGEST // 2]} … {text[-LONGEST // 4 :]}"


if __name__ == "__main__":
    anyio.run(main)
